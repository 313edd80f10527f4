#!/usr/bin/env bash
# Many small files: `udpack-client put DIR` against rsync to a daemon (no encryption), rsync over ssh, tar through ssh,
# and scp -r, on one machine; set-up, login and end are in the time.
#
#   bench/small-files.sh [DIR…]  where to work; default: in memory (/dev/shm) and on the disk of TMPDIR
#   FILES=10000 SIZE=4096        how much
# ROUNDS, BIN, RESULTS, WAYS: see bench/lib.sh. The ways take turns. After each run the bytes that arrived are compared
# with those that were sent. udpack syncs what it reports as stored, the others do not.
# shellcheck source=bench/lib.sh
. "$(dirname "$0")/lib.sh"

files=${FILES:-10000} size=${SIZE:-4096}
if [ $# -eq 0 ]; then
  set -- "${TMPDIR:-/tmp}"
  [ ! -d /dev/shm ] || set -- /dev/shm "$@"
fi
if [ $# -gt 1 ]; then
  for dir in "$@"; do
    bench/small-files.sh "$dir" &
    running=$!
    pids=("$running")
    wait "$running" || failed=1
  done
  exit "$failed"
fi
workspace "$1"
filesystem=$(df --output=fstype "$work" | tail -1)
case=small-files-$filesystem
results_into "$case"

# The files: FILES of SIZE bytes, 100 a directory, each with bytes of its own.
mkdir "$work/tree"
head -c $((files * size)) /dev/urandom | (
  cd "$work/tree"
  split -b "$size" -a 6 -d - f
  number=0
  for file in f*; do
    if [ $((number % 100)) -eq 0 ]; then
      dir=$(printf 'dir-%04d' $((number / 100)))
      mkdir "$dir"
    fi
    echo "$dir/$file"
    number=$((number + 1))
  done | while read -r target; do mv "${target##*/}" "$target"; done
)
sums() { (cd "$1" && find . -name .udpack -prune -o -type f -print0 | sort -z | xargs -0 sha256sum); }
sums "$work/tree" >"$work/expected"
[ "$(wc -l <"$work/expected")" -eq "$files" ] || { echo "made a wrong number of files"; exit 1; }

ways=(udpack)
if rsync_daemon; then ways+=(rsync-daemon); fi
if ssh_server; then
  ! have rsync || ways+=(rsync-ssh)
  ways+=(tar-ssh scp)
fi
way() {
  case $1 in
    udpack)
      udpack_server "$2"
      timed "${put[@]}" "$work/tree" --to "$host:$((port_base + 1))" --keys "$work/keys"
      stop "$pid"
      ;;
    rsync-daemon) timed rsync -a "$work/tree" "$rsync_url/${2##*/}/" ;;
    rsync-ssh) timed rsync -a -e "ssh ${ssh_options[*]}" "$work/tree" "peer:$2/" ;;
    tar-ssh) timed bash -c 'set -o pipefail; tar -C "$0" -cf - tree | ssh "${@:2}" peer "tar -C $1 -xf -"' "$work" "$2" "${ssh_options[@]}" ;;
    scp) timed scp -q -r "${ssh_options[@]}" "$work/tree" "peer:$2/" ;;
  esac
}

echo "$case: $files files of $size bytes, $rounds rounds, on $filesystem"
for round in $(seq "$rounds"); do
  for name in "${ways[@]}"; do
    wanted "$name" || continue
    # Nothing is removed before the end: ext4 is slow to reuse inodes that were freed a moment ago, whoever asks.
    target=$work/$round-$name
    mkdir "$target"
    sync -f "$work"
    [ "$filesystem" != tmpfs ] || touch_memory $((4 * files * size))
    way "$name" "$target"
    root=$target
    [ ! -d "$target/tree" ] || root=$target/tree
    sums "$root" >"$work/got"
    if [ "$status" -ne 0 ] || ! cmp -s "$work/expected" "$work/got"; then
      echo "round $round: $name FAILED ($status), or the files differ: $(tail -n 2 "$work/err" | tr '\n' ' ')"
      record "$case" "$name" "$round" files/s null
      failed=1
    else
      rate=$(awk "BEGIN { printf \"%.1f\", $files / $seconds }")
      record "$case" "$name" "$round" files/s "$rate" "{\"seconds\": $seconds, \"files\": $files, \"size\": $size}"
      printf 'round %d: %-12s %8.3f s %9.0f files/s\n' "$round" "$name" "$seconds" "$rate"
    fi
  done
done
table
exit "$failed"
