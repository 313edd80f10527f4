#!/usr/bin/env bash
# One message to a room of 1,000: on one server, on one of two nodes of a cluster where nobody else is in the room, and spread over three
# nodes; and Socket.IO, alone and with its Redis adapter, on the same work. Then what is lost while the broker is paused for 20 s.
#   bench/cluster.sh          about 4 minutes
# Needs nats-server; for Socket.IO node, npm and redis-server, else that is left out aloud. udpack encrypts, Socket.IO here does not.
#   ROUNDS    default 3; in a round each way has one turn
#   MEMBERS, COUNT, STEADY    default 1000, 300 messages, 30 s
set -eu
export LC_ALL=C
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin
rounds=${ROUNDS:-3} members=${MEMBERS:-1000} count=${COUNT:-300} steady=${STEADY:-30}
bin=${BIN:-${CARGO_TARGET_DIR:-target}/release}/udpack-bench-cluster
have() { command -v "$1" >/dev/null 2>&1; }
for tool in nats-server jq; do
  have $tool || { echo "SKIPPED: no $tool: scripts/install-test-tools"; exit 0; }
done
[ -x "$bin" ] || { echo "no $bin: cargo build --release --locked -p udpack-bench" >&2; exit 2; }

dir=$(mktemp -d) pids=()
stop() { for pid in "${pids[@]}"; do kill -CONT "$pid" 2>/dev/null; kill "$pid" 2>/dev/null; done; wait 2>/dev/null; pids=(); } || true
trap 'stop || true; rm -rf "$dir"' EXIT
begin() { "$@" & pids+=($!); }
# Waits for the first line of a file.
line() { until [ -s "$1" ]; do sleep 0.05; done; head -n 1 "$1"; }
port=$((20000 + $$ % 10000))

io=false
if have node && have npm && have redis-server; then
  if [ -d bench/cluster/node_modules ] || npm ci --prefix bench/cluster --no-audit --no-fund >/dev/null; then io=true; fi
fi
$io || echo 'SKIPPED: Socket.IO: needs node, npm and redis-server, and what bench/cluster/package.json names'

nats() {
  printf 'listen: "127.0.0.1:%s"\nmax_payload: 2MB\n' "$port" >"$dir/nats.conf"
  begin nats-server -c "$dir/nats.conf" 2>/dev/null
  broker=${pids[-1]}
  until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do sleep 0.05; done
}
redis() {
  begin redis-server --port "$port" --bind 127.0.0.1 --save '' --appendonly no --dir "$dir" >/dev/null
  broker=${pids[-1]}
  until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do sleep 0.05; done
}
# Starts so many nodes: NODES CLUSTERED; their addresses go to $at.
udpack_nodes() {
  at=()
  for n in $(seq "$1"); do
    : >"$dir/node-$n"
    if $2; then begin "$bin" node "$dir/keys" --cluster "nats://127.0.0.1:$port" >"$dir/node-$n"; else begin "$bin" node "$dir/keys" >"$dir/node-$n"; fi
    read -r address key <<<"$(line "$dir/node-$n")"
    at+=("$address")
  done
}
io_nodes() {
  at=()
  for n in $(seq "$1"); do
    : >"$dir/node-$n"
    if $2; then begin node bench/cluster/node.mjs "redis://127.0.0.1:$port" >"$dir/node-$n"; else begin node bench/cluster/node.mjs >"$dir/node-$n"; fi
    at+=("$(line "$dir/node-$n")")
  done
}

# One turn of a way; the result is a line of JSON.
turn() {
  case $1 in
    udpack-one) udpack_nodes 1 false && "$bin" members "$key" "${at[0]}" --members "$members" --count "$count" ;;
    udpack-local) nats && udpack_nodes 2 true && "$bin" members "$key" "${at[0]}" --members "$members" --count "$count" ;;
    udpack-three) nats && udpack_nodes 3 true && "$bin" members "$key" "${at[@]}" --members "$members" --count "$count" ;;
    socketio-one) io_nodes 1 false && node bench/cluster/members.mjs "$members" "$count" 0 "${at[0]}" ;;
    socketio-three) redis && io_nodes 3 true && node bench/cluster/members.mjs "$members" "$count" 0 "${at[@]}" ;;
  esac
}

ways=(udpack-one udpack-local udpack-three)
if $io; then ways+=(socketio-one socketio-three); fi
for round in $(seq "$rounds"); do
  for way in "${ways[@]}"; do
    turn "$way" >"$dir/result" || { echo "$way failed in round $round" >&2; stop; continue; }
    jq -c --arg way "$way" '. + { way: $way }' "$dir/result" >>"$dir/results"
    stop
  done
done
echo "one to $members, medians of $rounds: deliveries a second, p50 and p99 in ms"
jq -rs 'def median(f): map(f) | sort | .[length / 2 | floor]; group_by(.way)[] |
  "  \(.[0].way)  \(median(.rate) | round)/s  \(median(.p50) * 10 | round / 10)  \(median(.p99) * 10 | round / 10)"' "$dir/results"

# The broker stands still from the fifth second on, for 20 s; 100 members on three nodes hear 50 messages a second.
pause() {
  until grep -q begun "$dir/result" 2>/dev/null; do sleep 0.05; done
  sleep 5
  kill -STOP "$broker"
  sleep 20
  kill -CONT "$broker"
}
echo "the broker is paused for 20 s, of $steady s with 50 messages a second to 100 members: lost, and told to the members"
lost() {
  pause &
  local pauser=$!
  wait "$2"
  wait $pauser || true
  tail -n 1 "$dir/result" | jq -r --arg way "$1" '"  \($way)  \(.lost) of \(.sent)  told \(.told)"'
  stop
}
nats && udpack_nodes 3 true
"$bin" members "$key" "${at[@]}" --members 100 --steady "$steady" >"$dir/result" &
lost udpack-three $!
if $io; then
  redis && io_nodes 3 true
  node bench/cluster/members.mjs 100 0 "$steady" "${at[@]}" >"$dir/result" &
  lost socketio-three $!
fi
