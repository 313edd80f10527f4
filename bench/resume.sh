#!/usr/bin/env bash
# One large upload that is killed again and again, on alternating sides, and then finished: how many bytes are sent
# more than once?
#
#   bench/resume.sh [DIR]     DIR: where to work (about twice the size); default: a temporary directory
#   MIB=2048 KILLS=5 LIMIT=64 size, kills, MiB that may be sent again for each kill
#
# Takes the release binaries (cargo build --release --locked), or those in BIN. Bytes are counted where they arrive:
# what the server's processes wrote (Linux counts it, /proc/PID/io): staging, journal and nothing else. What is on the
# way at a kill, at most a window of 16 MiB, is not in it. The last client's own count is printed beside it.
# Ends with 1 if the hash differs or more was sent than allowed.
set -eu
cd "$(dirname "$0")/.."

mib=${MIB:-2048} kills=${KILLS:-5} limit=${LIMIT:-64}
bin=${BIN:-${CARGO_TARGET_DIR:-target}/release}
bin=$(cd "$bin" && pwd)
command -v jq >/dev/null || { echo "SKIPPED: no jq: scripts/install-test-tools"; exit 0; }

work=$(mktemp -d -p "${1:-${TMPDIR:-/tmp}}" udpack-bench.XXXXXX)
server='' client=''
cleanup() {
  [ -z "$client" ] || kill -9 "$client" 2>/dev/null || true
  [ -z "$server" ] || kill -9 "$server" 2>/dev/null || true
  wait 2>/dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

export UDPACK_KEYS=$work/keys
unset UDPACK_URL UDPACK_TOKEN UDPACK_TOKEN_FILE UDPACK_LISTEN UDPACK_DIR UDPACK_LOG_DIR RUST_LOG
size=$((mib << 20))
head -c "$size" /dev/urandom >"$work/large"
expected=$(sha256sum <"$work/large")
port=$((20000 + $$ % 10000))

start_server() {
  rm -f "$work/listening"
  mkfifo "$work/listening"
  "$bin/udpack-server" --listen "127.0.0.1:$port" --dir "$work/uploads" --max-file none --min-free 0 --json -q \
    >"$work/listening" 2>>"$work/server.log" &
  server=$!
  exec 3<"$work/listening"
  read -r _ <&3
  base=$(written)
}
# Bytes the server's process has written so far.
written() { awk '/^wchar:/ { print $2 }' "/proc/$server/io"; }
start_client() {
  "$bin/udpack-client" put "$work/large" --to "127.0.0.1:$port" --json --progress none -q \
    >"$work/client.json" 2>>"$work/client.log" &
  client=$!
}

# A client that reconnects by itself is left to it when the server is killed.
survives=0
if "$bin/udpack-client" put --help | grep -q -- --retries; then survives=1; fi

total=0
take() { total=$((total + $1)); printf '%-28s %6d MiB sent, %6d MiB in all\n' "$2" $(($1 >> 20)) $((total >> 20)); }

start_server
begun=$(date +%s.%N)
for number in $(seq "$kills"); do
  [ -n "$client" ] || start_client
  # Each run gets about an equal share of the whole before it is killed.
  share=$((size / (kills + 1)))
  from=$(written)
  while [ $(($(written) - from)) -lt "$share" ] && kill -0 "$client" 2>/dev/null; do sleep 0.01; done
  kill -0 "$client" 2>/dev/null || { echo "the upload ended before kill $number:"; cat "$work/client.json"; exit 1; }
  if [ $((number % 2)) -eq 1 ]; then
    side=client
    kill -9 "$client"
    wait "$client" 2>/dev/null || true
    client=''
    # What is under way still arrives.
    before=-1
    while [ "$before" != "$(written)" ]; do before=$(written); sleep 0.2; done
    take $(($(written) - base)) "kill $number, of the $side:"
    base=$(written)
  else
    side=server
    # Stopped first, so that nothing is written between the look and the end.
    kill -STOP "$server"
    sleep 0.05
    now=$(written)
    kill -9 "$server"
    wait "$server" 2>/dev/null || true
    take $((now - base)) "kill $number, of the $side:"
    if [ "$survives" -eq 0 ]; then
      kill -9 "$client" 2>/dev/null || true
      wait "$client" 2>/dev/null || true
      client=''
    fi
    exec 3<&-
    start_server
  fi
done
[ -n "$client" ] || start_client
status=0
wait "$client" || status=$?
client=''
take $(($(written) - base)) 'the last run:'
secs=$(awk "BEGIN { print $(date +%s.%N) - $begun }")
[ "$status" -eq 0 ] || { echo "the last run failed:"; tail -1 "$work/client.json"; exit 1; }
jq -r 'select(.event == "result") | "the last client says: \(.sent) bytes sent"' "$work/client.json"

failed=0
[ "$(sha256sum <"$work/uploads/large")" = "$expected" ] && echo 'hash equal' || { echo 'hash DIFFERS'; failed=1; }
allowed=$((size + kills * limit * 1048576))
printf 'size %d, sent %d in all, allowed %d (size + %d x %d MiB), %.1f s\n' "$size" "$total" "$allowed" "$kills" "$limit" "$secs"
[ "$total" -le "$allowed" ] || { echo 'more was sent than allowed'; failed=1; }
exit "$failed"
