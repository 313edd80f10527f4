#!/usr/bin/env bash
# What the programs do without a flag on networks that let no UDP pass, and where only an HTTP proxy leads out: a file up and
# down, events, the chat page in Chromium, the Python package, and how much later the first byte is there. On `outage` and
# `proxy-outage`, behind a proxy, UDP stops to pass in the middle of an upload and of numbered messages, and passes again 30 s after they
# have gone over to TCP. Between two network namespaces, 20 ms apart where the kernel has netem.
# As root; with target/release/examples/browser-chat (cargo build --release --locked -p udpack-examples --example browser-chat),
# and `npm ci` in crates/udpack-web/js.
#
#   bench/networks.sh [direct|no-udp|proxy|outage|proxy-outage…]   default: all, one after the other
#   SIZE=1G                     of the file; with an outage it takes SLOW=150 s
#   TRIES=10                    of the time until a file of one byte is stored
#   PYTHON=PROGRAM              with the package `udpack`; default: python3
# BIN, RESULTS: see bench/lib.sh.
# shellcheck source=bench/lib.sh
. "$(dirname "$0")/lib.sh"

size=$(numfmt --from=iec "${SIZE:-1G}")
tries=${TRIES:-10}
slow=${SLOW:-150}
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

block() { # RULES
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

# Waits until a file has this text, at most $3 s.
told() { # FILE TEXT SECONDS
  local tries
  for tries in $(seq $(($3 * 4))); do
    grep -q "$2" "$1" && return
    sleep 0.25
  done
  return 1
}

# Two pages of the chat, with $1 as proxy, if there is one.
chat() {
  local example=$bin/examples/browser-chat page
  if [ ! -x "$example" ] || ! have node; then skipped 'the chat page' 'no node, or no examples/browser-chat'; return; fi
  "${at_server[@]}" "$example" "$host" >"$work/chat" 2>>"$work/udpack.log" &
  local chat=$!
  pids+=("$chat")
  until_works grep -q page "$work/chat"
  page=$(jq -r .page "$work/chat")
  timed node bench/browser/chat.mjs "$page" ${1:+"$1"}
  [ "$status" -eq 0 ] || echo "FAILED ($status): $(tail -n 1 "$work/err")" >>"$work/out"
  said 'chat page in Chromium' "$(tail -n 1 "$work/out")"
  stop "$chat"
}

# Runs a command that tells of transports in lines of its output, while UDP goes and comes; FREE and BLOCKED are rules.
outage() { # WHAT FREE BLOCKED COMMAND…
  local what=$1 free=$2 blocked=$3 status=0 pid
  shift 3
  block "$free"
  "${at_client[@]}" "$@" >"$work/out" 2>"$work/err" </dev/null &
  pid=$!
  pids+=("$pid")
  sleep 5
  block "$blocked"
  if told "$work/out" '"transport": *"wss"' 90 && sleep 30 && block "$free" && told "$work/out" '"transport": *"quic"' 120; then
    wait "$pid" || status=$?
  else
    status=$(kill "$pid" 2>/dev/null; echo stalled)
  fi
  changes=$(jq -r 'select(.event == "transport") | .transport' "$work/out" | tr '\n' ' ')
  [ "$status" = 0 ] || said "$what" "FAILED ($status), transports: $changes: $(tail -n 2 "$work/err" | tr '\n' ' ')"
  [ "$status" = 0 ]
}

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

for network in "${@:-direct no-udp proxy outage proxy-outage}"; do for network in $network; do
  serve
  export UDPACK_URL=$url XDG_STATE_HOME=$work/home/state HOME=$work/home
  unset https_proxy
  udp='meta l4proto udp drop' tcp=''
  case $network in
    direct) block '' ;;
    outage) ;;
    no-udp) block "$udp" ;;
    proxy | proxy-outage)
      have tinyproxy || { skipped 'no tinyproxy'; stop "$pid"; continue; }
      printf 'Port 3128\nListen %s\nTimeout 600\nMaxClients 20\nLogLevel Critical\n' "$host" >"$work/proxy.conf"
      server=$pid
      start proxy "${at_server[@]}" tinyproxy -d -c "$work/proxy.conf"
      proxy=$pid pid=$server
      tcp='iifname veth0 tcp dport != 3128 drop' udp="iifname veth0 meta l4proto udp drop; iifname veth0 tcp dport != 3128 drop"
      block "$udp"
      until_works "${at_client[@]}" bash -c "exec 3<>/dev/tcp/$host/3128"
      export https_proxy=http://$host:3128
      ;;
    *) echo "no such network: $network" >&2; exit 2 ;;
  esac

  if [[ $network == *outage ]]; then
    if outage 'upload through it' "$tcp" "$udp" "$bin/udpack-client" put --progress none --json --bwlimit $((size / slow)) "$work/file"; then
      verdict=$([ "$changes" = 'wss quic ' ] && cmp -s "$work/file" "$work/in/file" && echo ok || echo FAILED)
      said 'upload through it' "$verdict, transports: $changes"
    fi
    if "$python" -c 'import udpack' 2>/dev/null; then
      "${at_server[@]}" "$python" bench/python/numbers.py serve "$host:4434" >"$work/numbers" 2>>"$work/udpack.log" &
      numbers=$!
      pids+=("$numbers")
      until_works grep -q udpack: "$work/numbers"
      if outage '10,000 messages each way' "$tcp" "$udp" "$python" bench/python/numbers.py count "$(head -n 1 "$work/numbers")" "$slow"; then
        result=$(jq -r 'select(.event == "end") | "lost \(.lost), doubled \(.doubled), out of order \(.reordered)"' "$work/out")
        verdict=$([ "$changes" = 'wss quic ' ] && [ "$result" = 'lost 0, doubled 0, out of order 0' ] && echo ok || echo FAILED)
        said '10,000 messages each way' "$verdict, $result, transports: $changes"
      fi
      stop "$numbers"
    else
      skipped '10,000 messages' 'PYTHON=PROGRAM with the package udpack'
    fi
    [ -z "${proxy:-}" ] || { stop "$proxy"; proxy=''; }
    stop "$pid"
    find "$work/in" -type f -delete
    continue
  fi

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

  chat "${https_proxy:-}"

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
