#!/usr/bin/env bash
# An upload into an S3 server (moto) whose udpack-server is killed again and again: bench/object-store.sh [SIZE [KILLS]]
# Prints one line: the size, the bytes that were sent to the store, the most that may be, and whether the object is the file.
# Needs udpack-server with the feature `store` and udpack-client in BIN (default target/release:
# cargo build --release -p udpack-cli --features store), moto_server (scripts/install-test-tools --python), curl. Works in
# WORK (default: a directory of its own in TMPDIR), with about three times the size.
set -eu
cd "$(dirname "$0")/.."

size=${1:-5G} kills=${2:-5}
bin=${BIN:-target/release} part=$((8 << 20)) in_flight=4
moto=target/python/bin/moto_server
[ -x "$moto" ] || moto=$(command -v moto_server) || { echo 'SKIPPED: no moto_server (scripts/install-test-tools --python)'; exit 0; }
"$bin/udpack-server" --help | grep -q -- --store || { echo "SKIPPED: $bin/udpack-server has no --store (--features store)"; exit 0; }
work=${WORK:-$(mktemp -d)}
mkdir -p "$work"
pids=()
cleanup() {
  for pid in "${pids[@]}" ${server:-}; do kill -9 "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  [ -n "${WORK:-}" ] || rm -rf "$work"
}
trap cleanup EXIT

# Passes connections on to moto, and keeps the number of bytes that went there in a file.
cat >"$work/count.py" <<'PY'
import asyncio, os, sys
to, file = int(sys.argv[1]), sys.argv[2]
sent = 0
async def pump(reader, writer, count):
    global sent
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
            if count:
                sent += len(data)
    except OSError:
        pass
    finally:
        writer.close()
async def serve(reader, writer):
    try:
        up, down = await asyncio.open_connection("127.0.0.1", to)
    except OSError:
        return writer.close()
    await asyncio.gather(pump(reader, down, True), pump(up, writer, False))
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    while True:
        with open(file + ".new", "w") as out:
            out.write(str(sent))
        os.replace(file + ".new", file)
        await asyncio.sleep(0.05)
asyncio.run(main())
PY

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
port=$(free_port)
"$moto" -H 127.0.0.1 -p "$port" >"$work/moto.log" 2>&1 &
pids+=($!)
until curl -fsS -X PUT "http://127.0.0.1:$port/bucket" >/dev/null 2>&1; do sleep 0.2; done
python3 "$work/count.py" "$port" "$work/sent" >"$work/proxy" &
pids+=($!)
until [ -s "$work/proxy" ] && [ -s "$work/sent" ]; do sleep 0.1; done

export AWS_ENDPOINT="http://127.0.0.1:$(cat "$work/proxy")" AWS_ALLOW_HTTP=true AWS_REGION=us-east-1
export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test
udp=$(python3 -c 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
serve() {
  : >"$work/server.out"
  "$bin/udpack-server" --listen "127.0.0.1:$udp" --no-tcp --keys "$work/keys" --dir "$work/journals" --allow-read \
    --store s3://bucket/bench >"$work/server.out" 2>>"$work/server.log" &
  server=$!
  until grep -q '^listening' "$work/server.out"; do
    kill -0 "$server" || { cat "$work/server.log"; exit 1; }
    sleep 0.05
  done
}
sent() { cat "$work/sent"; }

head -c "$size" /dev/urandom >"$work/file"
bytes=$(stat -c %s "$work/file")
serve
first=$(sent)
url=$("$bin/udpack-server" url --keys "$work/keys")
begun=$(date +%s.%N)
UDPACK_URL=$url "$bin/udpack-client" put "$work/file" >"$work/put.log" 2>&1 &
put=$!
for ((kill = 1; kill <= kills; kill++)); do
  until [ $(($(sent) - first)) -ge $((bytes * kill / (kills + 1))) ]; do
    kill -0 "$put" 2>/dev/null || { cat "$work/put.log"; echo 'the upload ended before the server was killed'; exit 1; }
    sleep 0.02
  done
  kill -9 "$server"
  wait "$server" 2>/dev/null || true
  if curl -fsS -o /dev/null "http://127.0.0.1:$port/bucket/bench/file" 2>/dev/null; then echo 'FAILED: a partial object is visible'; exit 1; fi
  serve
done
wait "$put" || { cat "$work/put.log" "$work/server.log"; exit 1; }
ended=$(date +%s.%N)
total=$(($(sent) - first))
# Headers of requests, and a trial at each start, beside the parts.
most=$((bytes + kills * part * in_flight + bytes / 1000 + (1 << 20)))
curl -fsS "http://127.0.0.1:$port/bucket/bench/file" | cmp - "$work/file" && same=identical || same=DIFFERENT
left=$(curl -fsS "http://127.0.0.1:$port/bucket?uploads" | grep -o '<UploadId>' | wc -l)
printf '%s bytes, %s kills: %s sent, at most %s; object %s; %s uploads left in the store; %.1f s\n' \
  "$bytes" "$kills" "$total" "$most" "$same" "$left" "$(python3 -c "print($ended - $begun)")"
[ "$total" -le "$most" ] && [ "$same" = identical ] && [ "$left" = 0 ]
