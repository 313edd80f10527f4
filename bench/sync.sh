#!/usr/bin/env bash
# What only a mirror is asked for, beside rsync: a large file of which little has changed, a large tree of which little has
# changed, a tree that was moved, odd names, a sparse file, and two paths at once. Each row prints its medians, its ratio and
# whether the ratio keeps its limit.
#
#   bench/sync.sh [-n ROUNDS] [--small] [ROW…]   default: all rows, 5 rounds
#   bench/sync.sh --list                         the rows
#   --small                                      sizes that show whether it works, in a minute; the ratios mean nothing then
#   SIZE=1G FILES=100000 PATHS_SIZE=128M SPARSE=20G   other sizes
# BIN, RESULTS, WAYS: see bench/lib.sh. The ways take turns. Rows with a link make it with ../shared/tools/wanlink, as root.
# After each run what arrived is compared with what was sent.
# shellcheck source=bench/lib.sh
. "$(dirname "$0")/lib.sh"

rows='delta-link      one file, 1 % changed by insertions, 100 Mbit/s and 50 ms: at most 3 % sent, 1.5 times rsync -z0 over ssh
delta-loopback  the same on this machine: put over the old version, at most 5 % slower than put of a new file
many            a tree of which 50 files changed: sync again, 1.5 times rsync to a daemon; its memory
moved           a tree moved into another directory: at most 1 % sent
names           500 odd names there and back: identical
sparse          a file with holes: at most 101 MiB sent and allocated
paths           two paths of 50 Mbit/s by --via: 1.85 times one of them; one cut half-way'

size=${SIZE:-1G} files=${FILES:-100000} paths_size=${PATHS_SIZE:-128M} sparse=${SPARSE:-20G} chosen=()
while [ $# -gt 0 ]; do
  case $1 in
    -n) rounds=$2; shift ;;
    --small) size=32M files=2000 paths_size=16M sparse=1G; rounds=1 ;;
    --list) echo "$rows"; exit 0 ;;
    -*) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2 ;;
    *) grep -q "^$1 " <<<"$rows" || { echo "no such row: $1"; exit 2; }; chosen+=("$1") ;;
  esac
  shift
done
[ ${#chosen[@]} -gt 0 ] || mapfile -t chosen < <(cut -d' ' -f1 <<<"$rows")
have python3 || { skipped 'no python3'; exit 0; }
size=$(numfmt --from=iec "$size") paths_size=$(numfmt --from=iec "$paths_size") sparse=$(numfmt --from=iec "$sparse")

# A process for each row, so that each has a clean place and undoes what it made.
if [ ${#chosen[@]} -gt 1 ]; then
  for row in "${chosen[@]}"; do
    # The sizes are numbers of bytes by now.
    SIZE=$size FILES=$files PATHS_SIZE=$paths_size SPARSE=$sparse bench/sync.sh -n "$rounds" "$row" || failed=1
  done
  exit "$failed"
fi
row=${chosen[0]}
memory=/dev/shm
[ -d "$memory" ] || memory=${TMPDIR:-/tmp}
case $row in
  many | names | sparse) workspace "${TMPDIR:-/tmp}" ;;
  *) workspace "$memory" ;;
esac
results_into "sync-$row"

# ---- our server, and a token that may do everything with its files.
serve() {
  server_flags=(--overwrite always)
  udpack_server "$1"
  if [ ! -e "$work/mirror" ]; then
    "$bin/udpack-server" token new mirror --scope read,write,delete --keys "$work/keys" | sed -n 's/^token //p' >"$work/mirror"
    chmod 600 "$work/mirror"
    # It is known as soon as the server has read its file again.
    until_works "${at_client[@]}" "$bin/udpack-client" ls --to "$host:$((port_base + 1))" --keys "$work/keys" --token-file "$work/mirror"
  fi
}
to=()
connect() { to=(--to "$host:$((port_base + 1))" --keys "$work/keys" --token-file "$work/mirror" --progress none --json -q); }
ours() { timed "$bin/udpack-client" "$@" "${to[@]}"; }
told() { tail -n 1 "$work/out" | jq -r ".$1 // 0"; }
# The most memory that a command took, in MiB, beside its time.
weighed() {
  timed python3 -c 'import resource, subprocess, sys
status = subprocess.call(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024))
sys.exit(status)' "$work/rss" "$@"
  rss=$(cat "$work/rss")
}
# One run: WAY ROUND; what it should have made is compared by the command that follows.
noted() {
  local name=$1 round=$2
  shift 2
  if [ "$status" -ne 0 ] || ! "$@"; then
    echo "round $round: $name FAILED ($status), or what arrived differs: $(tail -n 2 "$work/err" | tr '\n' ' ')"
    record "$row" "$name" "$round" s null
    failed=1
  else
    record "$row" "$name" "$round" s "$seconds" "${more:-"{}"}"
    printf 'round %d: %-14s %8.3f s %s\n' "$round" "$name" "$seconds" "${note:-}"
  fi
}
# The verdict of a row: WHAT VALUE (at-least|at-most) LIMIT.
verdict() {
  if awk "BEGIN { exit !($2 + 0 $([ "$3" = at-least ] && echo '>=' || echo '<=') $4) }"; then
    printf '%s: %s: %s (limit: %s %s) ok\n' "$row" "$1" "$2" "${3/-/ }" "$4"
  else
    printf '%s: %s: %s (limit: %s %s) MISSED\n' "$row" "$1" "$2" "${3/-/ }" "$4"
    failed=1
  fi
}
# How many times as fast one way is as another: the median of the ratios of each round.
times_as_fast() {
  jq -rs --arg a "$1" --arg b "$2" '
    def median: sort | if length == 0 then 0 elif length % 2 == 1 then .[length / 2 | floor] else (.[length / 2 - 1] + .[length / 2]) / 2 end;
    (map(select(.value != null)) | group_by(.round)) | map((map(select(.way == $a)) | first | .value) as $x
      | (map(select(.way == $b)) | first | .value) as $y | select($x != null and $y != null) | $y / $x) | median * 1000 | round / 1000' "$results_file"
}
# The greatest of what the runs of a way noted as FIELD.
greatest() { jq -rs --arg a "$1" --arg f "$2" 'map(select(.way == $a and .value != null) | .[$f]) | max // 0' "$results_file"; }

# A new version of a file: bytes inserted at 100 places, 1 % of it in all.
insert() {
  python3 - "$1" "$2" <<'P'
import os, random, sys
old, new = sys.argv[1:3]
size = os.path.getsize(old)
random.seed(7)
cuts = sorted(random.randrange(size) for _ in range(100))
with open(old, "rb") as source, open(new, "wb") as made:
    at = 0
    for cut in [*cuts, size]:
        left = cut - at
        while left > 0:
            block = source.read(min(left, 1 << 20))
            made.write(block)
            left -= len(block)
        if cut != size:
            made.write(os.urandom(size // 10000))
        at = cut
P
}
old_and_new() {
  head -c "$size" /dev/urandom >"$work/old"
  insert "$work/old" "$work/new"
  mkdir "$work/in"
}

delta_link() {
  link_there || exit 0
  have rsync || { skipped 'no rsync'; exit 0; }
  link_up delta 100 25 0 50
  link_anew 1 bbr
  ssh_server || exit 0
  old_and_new
  echo "$row: $size bytes, $rounds rounds"
  for round in $(seq "$rounds"); do
    for name in udpack rsync-ssh; do
      wanted "$name" || continue
      cp "$work/old" "$work/in/file"
      link_anew "$round" bbr
      if [ "$name" = udpack ]; then
        serve "$work/in"
        connect
        ours put "$work/new" --as file --if-exists overwrite
        stop "$pid"
      else
        timed rsync -z0 --no-whole-file -e "ssh ${ssh_options[*]}" "$work/new" "peer:$work/in/file"
      fi
      share=$(link_counts "$size" | jq -r '.sent * 100')
      more="{\"share\": $share}" note=$(printf '%.2f %% sent' "$share")
      noted "$name" "$round" cmp -s "$work/new" "$work/in/file"
    done
  done
  verdict 'percent of the file that crossed the link' "$(greatest udpack share)" at-most 3
  verdict 'times as fast as rsync -z0 over ssh' "$(times_as_fast udpack rsync-ssh)" at-least 1.5
}

delta_loopback() {
  old_and_new
  echo "$row: $size bytes, $rounds rounds"
  for round in $(seq "$rounds"); do
    for name in over new; do
      rm -f "$work/in/file"
      [ "$name" = new ] || cp "$work/old" "$work/in/file"
      serve "$work/in"
      connect
      touch_memory "$size"
      if [ "$name" = over ]; then
        ours put "$work/new" --as file --if-exists overwrite
      else
        ours put "$work/new" --as file
      fi
      stop "$pid"
      noted "$name" "$round" cmp -s "$work/new" "$work/in/file"
    done
  done
  verdict 'times as fast over the old version as without one' "$(times_as_fast over new)" at-least 0.95
}

# FILES files below DIR, 100 a directory, each with some bytes of its own.
grow() {
  python3 - "$1" "$files" <<'P'
import os, random, sys
root, count = sys.argv[1], int(sys.argv[2])
random.seed(3)
for n in range(count):
    where = f"{root}/{n // 10000:02}/{n // 100:04}"
    if n % 100 == 0:
        os.makedirs(where)
    with open(f"{where}/{n:06}", "wb") as made:
        made.write(random.randbytes(random.randrange(1, 4096)))
P
}
# Gives 50 of them other bytes: ROUND.
change() {
  python3 - "$1" "$files" "$2" <<'P'
import os, random, sys
root, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random.seed(seed)
for n in random.sample(range(count), 50):
    with open(f"{root}/{n // 10000:02}/{n // 100:04}/{n:06}", "wb") as made:
        made.write(random.randbytes(random.randrange(1, 4096)))
P
}
sums() { (cd "$1" && find . -name .udpack -prune -o -type f -print0 | sort -z | xargs -0 sha256sum); }
same_trees() { [ "$(sums "$1" | sha256sum)" = "$(sums "$2" | sha256sum)" ]; }

many() {
  grow "$work/tree"
  rsync_daemon || exit 0
  mkdir "$work/in" "$work/theirs"
  serve "$work/in"
  connect
  ours sync "$work/tree" :tree
  [ "$status" -eq 0 ] || { cat "$work/err"; exit 1; }
  timed rsync -a "$work/tree/" "$rsync_url/theirs/"
  [ "$status" -eq 0 ] || { cat "$work/err"; exit 1; }
  # rsync leaves its copy to the kernel. The first sync of the other server would write it, in its own time.
  sync
  echo "$row: $files files, 50 changed, $rounds rounds, on $(df --output=fstype "$work" | tail -1)"
  for round in $(seq "$rounds"); do
    change "$work/tree" "$round"
    for name in udpack rsync-daemon; do
      wanted "$name" || continue
      if [ "$name" = udpack ]; then
        weighed "$bin/udpack-client" sync "$work/tree" :tree "${to[@]}"
        target=$work/in/tree
      else
        weighed rsync -a "$work/tree/" "$rsync_url/theirs/"
        target=$work/theirs
      fi
      more="{\"rss\": $rss}" note="$rss MiB"
      noted "$name" "$round" same_trees "$work/tree" "$target"
    done
  done
  echo "$row: MiB at most: udpack $(greatest udpack rss), rsync $(greatest rsync-daemon rss)"
  verdict 'times as fast as rsync to a daemon' "$(times_as_fast udpack rsync-daemon)" at-least 1.5
}

moved() {
  mkdir -p "$work/tree/old" "$work/in"
  head -c "$size" /dev/urandom | (cd "$work/tree/old" && split -b "$((size / 64))" -a 3 -d - f)
  serve "$work/in"
  connect
  ours sync "$work/tree" :tree
  [ "$status" -eq 0 ] || { cat "$work/err"; exit 1; }
  echo "$row: $size bytes in 64 files, $rounds rounds"
  for round in $(seq "$rounds"); do
    mkdir -p "$work/tree/$round"
    mv "$work/tree"/*/f* "$work/tree/$round/"
    ours sync --delete --delta always "$work/tree" :tree
    share=$(awk "BEGIN { printf \"%.3f\", $(told sent) * 100 / $size }")
    more="{\"share\": $share}" note="$share % sent"
    noted udpack "$round" same_trees "$work/tree" "$work/in/tree"
  done
  verdict 'percent sent' "$(greatest udpack share)" at-most 1
}

odd_names() {
  mkdir "$work/tree" "$work/in"
  python3 - "$work/tree" <<'P'
import os, random, sys
root = os.fsencode(sys.argv[1])
random.seed(11)
made = set()
kinds = [
    lambda: bytes(random.choice([b for b in range(1, 256) if b != 47]) for _ in range(random.randrange(1, 40))),
    lambda: "".join(chr(random.choice([0xe9, 0x301, 0x4e2d, 0x1f600, 0x200d, 0x202e, 0xfeff])) for _ in range(random.randrange(1, 20))).encode(),
    lambda: random.choice([b"con", b"aux.txt", b"a:b", b"a\\b", b"trailing.", b"space ", b" lead", b"-n", b"~", b"%41", b"new\nline"]) + str(random.randrange(99)).encode(),
    lambda: b"x" * random.randrange(200, 256),
]
while len(made) < 500:
    name = random.choice(kinds)()
    if name in (b".", b"..", b".udpack") or name in made or len(name) > 255:
        continue
    made.add(name)
    with open(root + b"/" + name, "wb") as file:
        file.write(random.randbytes(random.randrange(0, 300)))
P
  serve "$work/in"
  connect
  echo "$row: $(find "$work/tree" -type f -printf x | wc -c) names"
  ours put "$work/tree/" --as tree
  if [ "$status" -eq 0 ]; then ours get tree --as "$work/back"; fi
  noted udpack 1 same_trees "$work/tree" "$work/back"
}

sparse() {
  mkdir "$work/in"
  python3 - "$work/holes" "$sparse" <<'P'
import os, sys
path, size = sys.argv[1], int(sys.argv[2])
with open(path, "wb") as made:
    made.truncate(size)
    for n in range(100):
        made.seek((size // 100 * n) & ~0xfff)
        made.write(os.urandom(1 << 20))
P
  serve "$work/in"
  connect
  echo "$row: $sparse bytes, 100 MiB of data"
  ours put "$work/holes"
  noted udpack 1 cmp -s "$work/holes" "$work/in/holes"
  verdict 'MiB sent' "$(($(told sent) / 1048576))" at-most 101
  verdict 'MiB allocated' "$(($(stat -c %b "$work/in/holes") / 2048))" at-most 101
}

# A second link beside the first, and addresses of its own.
second_link() {
  local ns number=1
  for ns in "$NETLAB_A" "$NETLAB_B"; do
    ip -n "$ns" tuntap add dev wan1 mode tun
    ip -n "$ns" link set wan1 mtu 1500 txqueuelen 10000
    ip -n "$ns" addr add "10.78.0.$number/24" dev wan1
    ip -n "$ns" link set wan1 up
    number=2
  done
  # The server has an address of its own, to which both lead.
  ip -n "$NETLAB_B" addr add 10.79.0.1/32 dev lo
  ip -n "$NETLAB_A" route add 10.79.0.1 via 10.77.0.2 dev wan0 metric 100
  ip -n "$NETLAB_A" route add 10.79.0.1 via 10.78.0.2 dev wan1 metric 200
  start second "$WANLINK_BIN" --ns-a "$NETLAB_A" --ns-b "$NETLAB_B" --dev wan1 "${link[@]}"
  second=$pid
  until_works grep -q '^wanlink: up' "$work/second.log"
  host=10.79.0.1
}
# The longest time without progress in lines of JSON that begin with their time.
longest_pause() {
  python3 - "$1" <<'P'
import json, sys
last = longest = None
bytes_ = -1
for line in open(sys.argv[1]):
    at, text = line.split(" ", 1)
    event = json.loads(text)
    if event["event"] == "progress" and event["bytes"] > bytes_:
        if last is not None:
            longest = max(longest or 0, float(at) - last)
        last, bytes_ = float(at), event["bytes"]
print(round(longest or 0, 2))
P
}
paths() {
  link_there || exit 0
  link_up paths 50 20 0 40
  second_link
  mkdir -p "$work/tree" "$work/in"
  head -c "$paths_size" /dev/urandom | (cd "$work/tree" && split -b "$((paths_size / 256))" -a 3 -d - f)
  echo "$row: $paths_size bytes in 256 files, two links of 50 Mbit/s and 40 ms, $rounds rounds"
  for round in $(seq "$rounds"); do
    for name in both one; do
      rm -rf "$work/in"
      mkdir "$work/in"
      serve "$work/in"
      connect
      via=wan0
      [ "$name" = one ] || via=wan0,wan1
      ours put "$work/tree/" --as tree --via "$via"
      stop "$pid"
      noted "$name" "$round" same_trees "$work/tree" "$work/in/tree"
    done
  done
  verdict 'times as fast over both as over one' "$(times_as_fast both one)" at-least 1.85
  # One of them is cut once a third has arrived.
  rm -rf "$work/in"
  mkdir "$work/in"
  serve "$work/in"
  connect
  : >"$work/timed"
  {
    "${at_client[@]}" timeout -k 5 "$limit" "$bin/udpack-client" put "$work/tree/" --as tree --via wan0,wan1 --to "$host:$((port_base + 1))" \
      --keys "$work/keys" --token-file "$work/mirror" --progress none --json -q 2>"$work/err" || echo failed >"$work/cut-failed"
  } | python3 -u -c 'import sys, time
for line in sys.stdin: print(time.time(), line, end="")' >"$work/timed" &
  running=$!
  third=$((paths_size / 3))
  until [ "$(sed -n 's/^[0-9.]* //p' "$work/timed" | jq -rs 'map(select(.event == "progress").bytes) | max // 0' 2>/dev/null || echo 0)" -ge "$third" ]; do
    kill -0 "$running" 2>/dev/null || break
    sleep 0.1
  done
  kill -STOP "$second"
  wait "$running" || true
  running=''
  kill -CONT "$second"
  stop "$pid"
  if [ -e "$work/cut-failed" ] || ! same_trees "$work/tree" "$work/in/tree"; then
    echo "$row: one cut: FAILED: $(tail -n 2 "$work/err" | tr '\n' ' ')"
    failed=1
  fi
  verdict 'longest pause in s when one is cut' "$(longest_pause "$work/timed")" at-most 2
}

case $row in
  names) odd_names ;;
  *) "${row//-/_}" ;;
esac
exit "$failed"
