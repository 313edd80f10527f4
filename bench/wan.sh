#!/usr/bin/env bash
# One file over links as they are between cities, made by ../shared/tools/wanlink: `udpack-client put` against TCP
# (iperf3, which carries bytes to nowhere, with kernel BBR and with CUBIC), curl to nginx and scp over kernel BBR, and
# qcp with BBR.
#
#   bench/wan.sh [--parallel] [CELL…]   default: all cells; --parallel: links up to 100 Mbit/s side by side
#   bench/wan.sh --list                 the cells
#   SIZE=10M                            another size of the file
#   WANLINK=DIR WANLINK_BIN=FILE        the emulator's source; its binary, built if this is not set
# ROUNDS, BIN, RESULTS, WAYS: see bench/lib.sh. The ways take turns, and every way of a round meets the same pattern of
# loss. A rate is the file's bytes by the wall time of the whole command, iperf3's what its receiver reports. `lost %`
# is what the link lost of the packets that a way sent towards the server, at random and in its queue.
# shellcheck source=bench/lib.sh
. "$(dirname "$0")/lib.sh"

# cell, Mbit/s, delay one way (ms), loss each way (%), drop-tail queue (ms: one bandwidth-delay product), file
cells='100M-50ms-0    100  25  0    50  100M
100M-50ms-1    100  25  1    50  100M
100M-50ms-2    100  25  2    50  100M
100M-50ms-5    100  25  5    50  100M
50M-200ms-1    50   100 1    200 100M
20M-300ms-2    20   150 2    300 60M
500M-20ms-0.1  500  10  0.1  20  300M
1G-10ms-0      1000 5   0    10  1G'

parallel=0 chosen=()
while [ $# -gt 0 ]; do
  case $1 in
    --list) echo "$cells"; exit 0 ;;
    --parallel) parallel=1 ;;
    -*) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2 ;;
    *) grep -q "^$1 " <<<"$cells" || { echo "no such cell: $1"; exit 2; }; chosen+=("$1") ;;
  esac
  shift
done
[ ${#chosen[@]} -gt 0 ] || mapfile -t chosen < <(cut -d' ' -f1 <<<"$cells")
link_there || exit 0

# Several cells: a process for each. Fast links take a core each, and have the machine for themselves.
if [ ${#chosen[@]} -gt 1 ]; then
  slow=() fast=()
  for cell in "${chosen[@]}"; do
    read -r _ rate _ <<<"$(grep "^$cell " <<<"$cells")"
    if [ "$parallel" = 1 ] && [ "$rate" -le 100 ]; then slow+=("$cell"); else fast+=("$cell"); fi
  done
  side_by_side 2 "${slow[@]/#/bench/wan.sh }"
  side_by_side 1 "${fast[@]/#/bench/wan.sh }"
  exit "$failed"
fi

cell=${chosen[0]}
read -r _ rate delay loss queue size <<<"$(grep "^$cell " <<<"$cells")"
size=$(numfmt --from=iec "${SIZE:-$size}")
rtt=$((delay * 2))
memory=/dev/shm
[ -d "$memory" ] || memory=${TMPDIR:-/tmp}
workspace "$memory"
results_into "wan-$cell"
link_up "${cell//[-.]/}" "$rate" "$delay" "$loss" "$queue"
link_anew 1 bbr
head -c "$size" /dev/urandom >"$work/file"
mkdir "$work/in"
# Six times what the link needs for the file, and 40 s; beyond it a run has failed.
limit=$((size * 48 / (rate * 1000000) + 40))

ways=(udpack iperf-bbr iperf-cubic)
if nginx_server; then ways+=(curl-bbr); fi
if ssh_server; then
  ways+=(scp-bbr)
  if qcp_client; then ways+=(qcp-bbr); fi
fi
[ "$cell" != 1G-10ms-0 ] || ways+=(udpack-cubic)
start iperf "${at_server[@]}" iperf3 -s -p "$((port_base + 5))"

udpack() {
  udpack_server "$work/in"
  timed "${put[@]}" "$work/file" --to "$host:$((port_base + 1))" --keys "$work/keys" "$@"
  stop "$pid"
}
iperf() {
  local control=$1
  shift
  timed iperf3 -c "$host" -p "$((port_base + 5))" -J "$@"
  # What did arrive, by the receiver's clock.
  if [ "$status" -eq 0 ]; then
    seconds=$(jq -r '.end.sum_received.seconds' "$work/out")
    bytes=$(jq -r '.end.sum_received.bytes' "$work/out")
    [ "$(jq -r .end.sender_tcp_congestion "$work/out")" = "$control" ] || { echo "iperf3 did not use $control"; status=1; }
  fi
}
way() {
  case $1 in
    udpack) udpack ;;
    udpack-cubic) udpack --cc cubic ;;
    iperf-bbr) iperf bbr -n "$size" ;;
    # Under loss CUBIC would take minutes for the file: a sample of it.
    iperf-cubic) if [ "$loss" = 0 ]; then iperf cubic -n "$size"; else iperf cubic -t 12; fi ;;
    curl-bbr) timed "${curl[@]}" -T "$work/file" "$nginx_url/in/file" ;;
    scp-bbr) timed scp -q "${ssh_options[@]}" "$work/file" "peer:$work/in/file" ;;
    # Told what the path carries, as its manual asks for.
    qcp-bbr) timed "${qcp[@]}" --congestion bbr --tx "$((rate * 125))k" --rx "$((rate * 125))k" --rtt "$rtt" "$work/file" "peer:$work/in/file" ;;
  esac
}

echo "$cell: $rate Mbit/s, $rtt ms, loss $loss % each way, queue $queue ms; a file of $size bytes, $rounds rounds"
for round in $(seq "$rounds"); do
  for name in "${ways[@]}"; do
    wanted "$name" || continue
    control=bbr
    [ "${name##*-}" != cubic ] || control=cubic
    link_anew "$round" "$control"
    bytes=$size
    way "$name"
    why=''
    if [ "$status" -ne 0 ]; then
      why="status $status: $(tail -n 2 "$work/err" | tr '\n' ' ')$(jq -r '.error // empty' "$work/out" 2>/dev/null || true)"
    elif [[ $name != iperf* ]] && ! cmp -s "$work/file" "$work/in/file"; then
      why='the bytes DIFFER'
    fi
    counts=$(link_counts "$bytes")
    if [ -n "$why" ]; then
      echo "round $round: $name FAILED: $why"
      record "$cell" "$name" "$round" MB/s null "$(jq -c --arg why "$why" '. + {why: $why}' <<<"$counts")"
      [[ $name != udpack* ]] || failed=1
    else
      value=$(awk "BEGIN { printf \"%.4f\", $bytes / $seconds / 1e6 }")
      share=$(awk "BEGIN { printf \"%.4f\", $value * 8 / $rate }")
      record "$cell" "$name" "$round" MB/s "$value" "$(jq -c ". + {bytes: $bytes, seconds: $seconds, link: $share}" <<<"$counts")"
      printf 'round %d: %-12s %8.3f s %9.3f MB/s %5.1f %% of the link, %6.2f %% lost\n' "$round" "$name" "$seconds" "$value" \
        "$(awk "BEGIN { print $share * 100 }")" "$(jq .lost <<<"$counts")"
    fi
    find "$work/in" -mindepth 1 -delete
  done
done
table
exit "$failed"
