#!/usr/bin/env bash
# Many small files: `udpack-client put DIR` against `rsync -a` and `scp -r` over ssh to this machine, to the same disk.
#
#   bench/small-files.sh [DIR]      DIR: where to work; default: a temporary directory
#   FILES=10000 SIZE=4096 ROUNDS=3  how much, how often
#
# Takes the release binaries (cargo build --release --locked), or those in BIN. The ways take turns; the times are
# medians. After each run the bytes that arrived are compared with those that were sent. The sshd is its own, on a
# high port, with a throw-away key and configuration; nothing of the system's is read or changed.
# Needs what scripts/install-test-tools installs, and is SKIPPED without.
set -eu
cd "$(dirname "$0")/.."

files=${FILES:-10000} size=${SIZE:-4096} rounds=${ROUNDS:-3}
bin=${BIN:-${CARGO_TARGET_DIR:-target}/release}
bin=$(cd "$bin" && pwd)
for program in rsync ssh scp ssh-keygen jq; do
  command -v "$program" >/dev/null || { echo "SKIPPED: no $program: scripts/install-test-tools"; exit 0; }
done
sshd=$(PATH=$PATH:/usr/sbin command -v sshd) || { echo "SKIPPED: no sshd: scripts/install-test-tools"; exit 0; }

work=$(mktemp -d -p "${1:-${TMPDIR:-/tmp}}" udpack-bench.XXXXXX)
server='' daemon=''
cleanup() {
  [ -z "$server" ] || kill "$server" 2>/dev/null || true
  [ -z "$daemon" ] || kill "$daemon" 2>/dev/null || true
  wait 2>/dev/null || true
  rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

now() { date +%s.%N; }

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

# An sshd of our own. It runs as this user, without the system's configuration, accounts or passwords.
ssh_port=$((20000 + $$ % 10000))
ssh-keygen -q -t ed25519 -N '' -f "$work/host"
ssh-keygen -q -t ed25519 -N '' -f "$work/user"
cp "$work/user.pub" "$work/authorized"
cat >"$work/sshd.conf" <<CONF
Port $ssh_port
ListenAddress 127.0.0.1
HostKey $work/host
AuthorizedKeysFile $work/authorized
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PermitRootLogin prohibit-password
PidFile none
Subsystem sftp internal-sftp
CONF
# sshd wants its directory when it is root; nothing is put there.
[ "$(id -u)" -ne 0 ] || mkdir -p /run/sshd
"$sshd" -D -e -f "$work/sshd.conf" 2>"$work/sshd.log" &
daemon=$!
printf '127.0.0.1 %s\n' "$(cut -d' ' -f1,2 <"$work/host.pub")" | sed "s/^127.0.0.1/[127.0.0.1]:$ssh_port/" >"$work/known"
options=(-F none -i "$work/user" -o IdentitiesOnly=yes -o IdentityAgent=none -o BatchMode=yes
  -o "UserKnownHostsFile=$work/known" -o StrictHostKeyChecking=yes -o LogLevel=ERROR)
user=$(id -un)
tries=0
until ssh "${options[@]}" -p "$ssh_port" "$user@127.0.0.1" true 2>"$work/ssh.err"; do
  tries=$((tries + 1))
  [ "$tries" -lt 50 ] || { echo "ssh does not work here:"; cat "$work/ssh.err" "$work/sshd.log"; exit 1; }
  sleep 0.1
done

export UDPACK_KEYS=$work/keys
unset UDPACK_URL UDPACK_TOKEN UDPACK_TOKEN_FILE UDPACK_LISTEN UDPACK_DIR UDPACK_LOG_DIR RUST_LOG

# Each way has its server running before the clock starts and fills an empty directory.
udpack() {
  rm -f "$work/listening"
  mkfifo "$work/listening"
  "$bin/udpack-server" --listen 127.0.0.1:0 --dir "$1" --min-free 0 --json -q >"$work/listening" 2>>"$work/server.log" &
  server=$!
  exec 3<"$work/listening"
  read -r line <&3
  address=$(jq -r .listening <<<"$line")
  begun=$(now)
  "$bin/udpack-client" put "$work/tree" --to "$address" --progress none -q >"$work/client.log"
  ended=$(now)
  kill "$server"
  wait "$server" || true
  server=''
  exec 3<&-
}
rsync_() {
  mkdir -p "$1"
  begun=$(now)
  rsync -a -e "ssh ${options[*]} -p $ssh_port" "$work/tree" "$user@127.0.0.1:$1/"
  ended=$(now)
}
scp_() {
  mkdir -p "$1"
  begun=$(now)
  scp -q -r "${options[@]}" -P "$ssh_port" "$work/tree" "$user@127.0.0.1:$1/"
  ended=$(now)
}

echo "$files files of $size bytes, $rounds rounds, on $(df --output=source,fstype "$work" | tail -1)"
for round in $(seq "$rounds"); do
  for way in udpack rsync_ scp_; do
    # Nothing is removed before the end: ext4 is slow to reuse inodes that were freed a moment ago, whoever asks.
    target=$work/$round-$way
    sync -f "$work"
    "$way" "$target"
    if [ -d "$target/tree" ]; then sums "$target/tree"; else sums "$target"; fi >"$work/got"
    cmp -s "$work/expected" "$work/got" || { echo "${way%_}: the files differ"; diff "$work/expected" "$work/got" | head -5; exit 1; }
    seconds=$(awk "BEGIN { print $ended - $begun }")
    echo "$seconds" >>"$work/times.$way"
    printf 'round %d: %-6s %8.3f s\n' "$round" "${way%_}" "$seconds"
  done
done

median() { sort -n "$work/times.$1" | awk '{ v[NR] = $1 } END { print (NR % 2) ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }
awk -v u="$(median udpack)" -v r="$(median rsync_)" -v s="$(median scp_)" -v n="$files" 'BEGIN {
  printf "median: udpack %.3f s (%.0f files/s), rsync %.3f s, scp %.3f s\n", u, n / u, r, s
  printf "udpack is %.2f times as fast as rsync, %.2f times as fast as scp; all hashes equal\n", r / u, s / u
}'
