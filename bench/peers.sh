#!/usr/bin/env bash
# One large file to another place of this machine, from memory to memory (tmpfs): `udpack-client put` against scp,
# rsync, curl to nginx, qcp, and what a raw quinn stream carries; and over a WebSocket, for networks that let no UDP pass.
#
#   bench/peers.sh               over loopback
#   bench/peers.sh --netns       between two network namespaces, joined by a veth pair with an MTU of 1,500 (as root)
#   SIZE=1G                      bytes of the file
# ROUNDS, BIN, RESULTS, WAYS: see bench/lib.sh. The ways take turns. A time is that of the whole command: start, login,
# transfer, and what it waits for at its end. Afterwards the bytes that arrived are compared with those sent.
# shellcheck source=bench/lib.sh
. "$(dirname "$0")/lib.sh"

size=$(numfmt --from=iec "${SIZE:-1G}")
case=loopback
for argument in "$@"; do
  case $argument in
    --netns) case=netns ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2 ;;
  esac
done
memory=/dev/shm
[ -d "$memory" ] || memory=${TMPDIR:-/tmp}
workspace "$memory"
results_into "peers-$case"

if [ "$case" = netns ]; then
  have ip || { skipped 'no ip'; exit 0; }
  a=udpack-a-$$ b=udpack-b-$$
  undo() { ip netns del "$a" 2>/dev/null || true; ip netns del "$b" 2>/dev/null || true; }
  ip netns add "$a" 2>/dev/null || { skipped 'no network namespaces' 'needs root'; exit 0; }
  ip netns add "$b"
  ip -n "$a" link add veth0 mtu 1500 type veth peer name veth0 mtu 1500 netns "$b"
  ip -n "$a" addr add 10.78.0.1/24 dev veth0
  ip -n "$b" addr add 10.78.0.2/24 dev veth0
  for ns in "$a" "$b"; do ip -n "$ns" link set lo up; ip -n "$ns" link set veth0 up; done
  at_client=(ip netns exec "$a") at_server=(ip netns exec "$b") host=10.78.0.2
fi

head -c "$size" /dev/urandom >"$work/file"
mkdir "$work/in"
ways=(udpack udpack-wss)
if ssh_server; then
  ways+=(scp scp-gcm)
  if have rsync; then ways+=(rsync-ssh); fi
  if qcp_client; then ways+=(qcp); fi
fi
if rsync_daemon; then ways+=(rsync-daemon); fi
if nginx_server; then ways+=(curl-nginx); fi
have_bench || true

udpack() { # TRANSPORT
  udpack_server "$work/in"
  timed "${put[@]}" "$work/file" --to "$host:$((port_base + 1))" --keys "$work/keys" --transport "$1"
  stop "$pid"
}
way() {
  case $1 in
    udpack) udpack quic ;;
    udpack-wss) udpack wss ;;
    scp) timed scp -q "${ssh_options[@]}" "$work/file" "peer:$work/in/file" ;;
    scp-gcm) timed scp -q "${ssh_options[@]}" -c aes128-gcm@openssh.com "$work/file" "peer:$work/in/file" ;;
    rsync-ssh) timed rsync -e "ssh ${ssh_options[*]}" "$work/file" "peer:$work/in/file" ;;
    rsync-daemon) timed rsync "$work/file" "$rsync_url/in/file" ;;
    curl-nginx) timed "${curl[@]}" -T "$work/file" "$nginx_url/in/file" ;;
    # Told what the path carries, as its manual asks for: 1 GB/s, 5 ms.
    qcp) timed "${qcp[@]}" --tx 1000M --rx 1000M --rtt 5 "$work/file" "peer:$work/in/file" ;;
  esac
}

quinn() {
  local arm only=''
  for arm in quinn tuned; do ! wanted "$arm-stream" || only+=${only:+,}$arm; done
  [ -n "$only" ] || return 0
  "$bench" stream --only "$only" --rounds 1 --bytes "$size" --json --listen "$host" --client-via "${at_client[*]}" \
    --server-via "${at_server[*]}" >"$work/stream.json"
  jq -r '.scenarios[0].arms | to_entries[] | [.key, .value.runs[0].values.rate] | @tsv' "$work/stream.json" | while read -r arm rate; do
    record "$case" "$arm-stream" "$1" MB/s "$rate" "{\"bytes\": $size}"
    printf 'round %d: %-12s %11s %9.1f MB/s\n' "$1" "$arm-stream" '' "$rate"
  done
}

echo "$case: one file of $size bytes, $rounds rounds, $(nproc) cores, TCP: $(cat /proc/sys/net/ipv4/tcp_congestion_control)"
for round in $(seq "$rounds"); do
  for name in "${ways[@]}"; do
    wanted "$name" || continue
    touch_memory $((2 * size))
    way "$name"
    if [ "$status" -ne 0 ]; then
      echo "round $round: $name FAILED ($status): $(tail -n 2 "$work/err" | tr '\n' ' ')"
      record "$case" "$name" "$round" MB/s null
      failed=1
    elif ! cmp -s "$work/file" "$work/in/file"; then
      echo "round $round: $name: the bytes DIFFER"
      record "$case" "$name" "$round" MB/s null
      failed=1
    else
      rate=$(awk "BEGIN { printf \"%.3f\", $size / $seconds / 1e6 }")
      record "$case" "$name" "$round" MB/s "$rate" "{\"bytes\": $size, \"seconds\": $seconds}"
      printf 'round %d: %-12s %8.3f s %9.1f MB/s\n' "$round" "$name" "$seconds" "$rate"
    fi
    find "$work/in" -mindepth 1 -delete
  done
  # The same bytes over a raw stream to nowhere: by quinn's defaults, and with the settings of this project.
  if [ -n "$bench" ]; then quinn "$round"; fi
done
table
exit "$failed"
