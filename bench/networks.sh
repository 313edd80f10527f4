#!/usr/bin/env bash
# What the programs do without a flag on networks that let no UDP pass, and where only an HTTP proxy leads out: a file up and
# down, events, the Python package, and how much later the first byte is there. Between two network namespaces, 20 ms apart where
# the kernel has netem.
# As root.
#
#   bench/networks.sh [direct|no-udp|proxy…]   default: all three, one after the other
#   SIZE=1G                     of the file
#   TRIES=10                    of the time until a file of one byte is stored
#   PYTHON=PROGRAM              with the package `udpack`; default: python3
# BIN, RESULTS: see bench/lib.sh. The page in Chromium: `node scripts/test.js fallback` in crates/udpack-web/js.
# shellcheck source=bench/lib.sh
. "$(dirname "$0")/lib.sh"

size=$(numfmt --from=iec "${SIZE:-1G}")
tries=${TRIES:-10}
python=${PYTHON:-python3}
for tool in ip nft tc; do have "$tool" || { skipped "no $tool"; exit 0; }; done
memory=/dev/shm
[ -d "$memory" ] || memory=${TMPDIR:-/tmp}
workspace "$memory"
results_into networks
a=udpack-a-$$ b=udpack-b-$$
undo() { ip netns del "$a" 2>/dev/null || true; ip netns del "$b" 2>/dev/null || true; }
ip netns add "$a" 2>/dev/null || { skipped 'no network namespaces' 'needs root'; exit 0; }
ip netns add "$b"
ip -n "$a" link add veth0 type veth peer name veth0 netns "$b"
ip -n "$a" addr add 10.79.0.1/24 dev veth0
ip -n "$b" addr add 10.79.0.2/24 dev veth0
for ns in "$a" "$b"; do
  ip -n "$ns" link set lo up
  ip -n "$ns" link set veth0 up
done
host=10.79.0.2 port=4433 rtt=20
for ns in "$a" "$b"; do
  tc -n "$ns" qdisc add dev veth0 root netem delay 10ms limit 100000 2>/dev/null || rtt=0
done
[ "$rtt" -gt 0 ] || skipped 'the 20 ms between the two' 'the kernel has no netem'
at_server=(ip netns exec "$b") at_client=(ip netns exec "$a")

head -c "$size" /dev/urandom >"$work/file"
printf x >"$work/byte"
mkdir "$work/in"

# Sets $url.
serve() {
  rm -f "$work/listening"
  mkfifo "$work/listening"
  "${at_server[@]}" "$bin/udpack-server" --listen "$host:$port" --dir "$work/in" --keys "$work/keys" --min-free 0 --max-file none \
    --allow-read --json -q >"$work/listening" 2>>"$work/udpack.log" &
  pid=$!
  pids+=("$pid")
  exec 3<"$work/listening"
  read -r _ <&3 || { cat "$work/udpack.log" >&2; exit 1; }
  exec 3<&-
  url=$("$bin/udpack-server" url --keys "$work/keys" --public-host "$host")
}

block() { # nothing|udp|all-but-the-proxy
  "${at_server[@]}" nft flush ruleset
  "${at_server[@]}" nft -f - <<RULES
table inet lab {
  chain in {
    type filter hook input priority 0;
    $1
  }
}
RULES
}

said() { # WHAT OK DETAIL
  printf '%-8s %-28s %s\n' "$network" "$1" "$2"
  [ "${2%% *}" != FAILED ] || failed=1
}
did() { if [ "$status" -eq 0 ] && "${@:2}"; then said "$1" "$(printf '%8.3f s' "$seconds")"; else said "$1" "FAILED ($status): $(tail -n 2 "$work/err" | tr '\n' ' ')"; fi; }

# The median time, in ms, in which a file of one byte is stored: connecting is nearly all of it.
first_byte() {
  local n
  for n in $(seq "$tries"); do
    # What was learned of the network is forgotten: each is a first time.
    rm -rf "$work/home/state"
    timed "${put[@]}" "$work/byte" --as "byte-$n"
    [ "$status" -eq 0 ] || { did 'first byte' true; return; }
    echo "$seconds"
  done | sort -n | awk '{ all[NR] = $1 } END { printf "%.0f", all[int((NR + 1) / 2)] * 1000 }'
}

for network in "${@:-direct no-udp proxy}"; do for network in $network; do
  serve
  export UDPACK_URL=$url XDG_STATE_HOME=$work/home/state HOME=$work/home
  unset https_proxy
  case $network in
    direct) block '' ;;
    no-udp) block 'meta l4proto udp drop' ;;
    proxy)
      have tinyproxy || { skipped 'no tinyproxy'; stop "$pid"; continue; }
      printf 'Port 3128\nListen %s\nTimeout 600\nMaxClients 20\nLogLevel Critical\nConnectPort %d\n' "$host" "$port" >"$work/proxy.conf"
      server=$pid
      start proxy "${at_server[@]}" tinyproxy -d -c "$work/proxy.conf"
      proxy=$pid pid=$server
      block 'iifname veth0 meta l4proto udp drop; iifname veth0 tcp dport != 3128 drop'
      until_works "${at_client[@]}" bash -c "exec 3<>/dev/tcp/$host/3128"
      export https_proxy=http://$host:3128
      ;;
    *) echo "no such network: $network" >&2; exit 2 ;;
  esac

  ms=$(first_byte)
  [ "$network" != direct ] || direct=$ms
  said 'first byte' "$ms ms"
  [ -z "${direct:-}" ] || [ "$network" = direct ] || {
    more=$((ms - direct))
    verdict=$([ "$more" -le $((rtt + 300)) ] && echo met || echo MISSED)
    said 'later than direct' "$more ms (goal: at most $((rtt + 300))) $verdict"
  }
  record networks "$network" 1 ms "$ms"

  timed "${put[@]}" "$work/file"
  did "put of $size bytes" cmp -s "$work/file" "$work/in/file"
  timed "$bin/udpack-client" get file --as "$work/back" --progress none -q
  did 'get of it' cmp -s "$work/file" "$work/back"

  "${at_client[@]}" "$bin/udpack-client" listen >"$work/heard" 2>>"$work/udpack.log" &
  listener=$!
  pids+=("$listener")
  heard() { "${at_client[@]}" "$bin/udpack-client" send said '"hello"' && grep -q hello "$work/heard"; }
  if until_works heard; then said 'event to a listener' ok; else said 'event to a listener' FAILED; fi
  stop "$listener"

  if "$python" -c 'import udpack' 2>/dev/null; then
    timed "$python" -c 'import sys, udpack.sync as u; u.upload(sys.argv[1], sys.argv[2], remote="python")' "$url" "$work/file"
    did 'put by Python' cmp -s "$work/file" "$work/in/python"
  else
    skipped 'Python' "PYTHON=PROGRAM with the package udpack"
  fi
  [ -z "${proxy:-}" ] || { stop "$proxy"; proxy=''; }
  stop "$pid"
  find "$work/in" "$work/back" -mindepth 0 -type f -delete
done; done
exit "$failed"
