# What the comparisons with other programs share; sourced by peers.sh, wan.sh, fairness.sh, small-files.sh and sync.sh.
#
# BIN       where udpack-server, udpack-client and udpack-bench are; default: target/release
# ROUNDS    how often every way is taken; default 5. In a round each way has one turn.
# RESULTS   directory of the results, a JSON object a line and run; default: target/bench-results
# WAYS      only these, by name
# Every program gets keys, configuration, port and directory of its own in a temporary directory, which goes at the
# end and on a signal. Nothing of the system's is read or changed.
# shellcheck shell=bash disable=SC2034 # used by those that source this

set -eu
export LC_ALL=C
cd "$(dirname "${BASH_SOURCE[0]}")/.."

rounds=${ROUNDS:-5}
results=${RESULTS:-${CARGO_TARGET_DIR:-target}/bench-results}
bin=${BIN:-${CARGO_TARGET_DIR:-target}/release}
if [ ! -x "$bin/udpack-client" ] || [ ! -x "$bin/udpack-server" ]; then
  echo "no udpack-client and udpack-server in $bin: cargo build --release --locked -p udpack-cli" >&2
  exit 2
fi
bin=$(cd "$bin" && pwd)
mkdir -p "$results"
results=$(cd "$results" && pwd)

PATH=$PATH:/usr/sbin:/sbin
unset "${!UDPACK_@}" RUST_LOG RSYNC_RSH SSH_AUTH_SOCK http_proxy https_proxy HTTPS_PROXY all_proxy ALL_PROXY

# Says aloud what is left out and how to get it.
skipped() { echo "SKIPPED: $1: ${2:-scripts/install-test-tools}"; }
have() { command -v "$1" >/dev/null 2>&1; }
have jq || { skipped 'no jq'; exit 0; }

failed=0 work='' pids=() running=''
at_server=() at_client=() host=127.0.0.1
port_base=$((20000 + $$ % 10000))

# Makes the temporary directory under $1; more to undo at the end goes into `undo`.
workspace() {
  work=$(mktemp -d -p "$1" udpack-bench.XXXXXX)
  trap finish EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  mkdir "$work/home"
}
undo() { :; }
finish() {
  trap '' HUP INT TERM
  local pid
  for pid in $running "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
  wait 2>/dev/null || true
  undo
  [ -z "$work" ] || rm -rf "$work"
}

# Starts a server: NAME COMMAND…; its output goes to $work/NAME.log, its process id to $pid.
start() {
  local name=$1
  shift
  "$@" >>"$work/$name.log" 2>&1 </dev/null &
  pid=$!
  pids+=("$pid")
}
stop() {
  local kept=() other
  kill "$1" 2>/dev/null || true
  wait "$1" 2>/dev/null || true
  for other in "${pids[@]}"; do [ "$other" = "$1" ] || kept+=("$other"); done
  pids=("${kept[@]}")
}
# Waits until a command succeeds, at most 10 s.
until_works() {
  local tries=0
  until "$@" >/dev/null 2>&1; do
    tries=$((tries + 1))
    [ "$tries" -lt 100 ] || { echo "no answer: $*" >&2; return 1; }
    sleep 0.1
  done
}

# Has the system hold $1 bytes of free memory. What is free, a hypervisor may have taken back, and whose turn it is to ask
# for it first would pay for that: 0.3 to 2.5 s for 1 GiB.
touch_memory() {
  head -c "$1" /dev/zero >"$work/touched"
  rm "$work/touched"
}

# Runs a command on the client's side, at most `limit` s; sets $seconds, its whole wall time, and $status.
limit=600
timed() {
  local begun ended
  begun=$EPOCHREALTIME
  status=0
  # In the background, since a shell heeds no signal while it waits for a command in the foreground.
  "${at_client[@]}" timeout -k 5 "$limit" "$@" >"$work/out" 2>"$work/err" </dev/null &
  running=$!
  wait "$running" || status=$?
  ended=$EPOCHREALTIME
  running=''
  seconds=$(awk "BEGIN { printf \"%.6f\", $ended - $begun }")
}

# Runs commands of plain words: AT-ONCE COMMAND…; side by side, the output of each is printed whole, in their order.
side_by_side() {
  local at_once=$1 command number=0
  shift
  [ -n "$work" ] || workspace "${TMPDIR:-/tmp}"
  for command in "$@"; do
    number=$((number + 1))
    while [ "$(jobs -pr | wc -l)" -ge "$at_once" ]; do wait -n || failed=1; done
    # shellcheck disable=SC2086
    if [ "$at_once" -eq 1 ]; then $command & else $command >"$work/$number.out" 2>&1 & fi
    pids+=($!)
  done
  while [ -n "$(jobs -pr)" ]; do wait -n || failed=1; done
  pids=()
  [ "$at_once" -eq 1 ] || for number in $(seq $#); do cat "$work/$number.out"; done
}

# ---- ours: the server is fresh for each run and listens before the clock starts. `server_flags` are more of its flags.
server_flags=()
udpack_server() {
  rm -f "$work/listening"
  mkfifo "$work/listening"
  "${at_server[@]}" "$bin/udpack-server" --listen "$host:${2:-$((port_base + 1))}" --dir "$1" --keys "$work/keys" --min-free 0 \
    --max-file none --json -q "${server_flags[@]}" >"$work/listening" 2>>"$work/udpack.log" &
  pid=$!
  pids+=("$pid")
  exec 3<"$work/listening"
  read -r _ <&3 || { cat "$work/udpack.log" >&2; return 1; }
  exec 3<&-
}
put=("$bin/udpack-client" put --progress none --json -q)

# ---- what measures raw quinn and messages.
bench=''
have_bench() {
  if [ -x "$bin/udpack-bench" ]; then bench=$bin/udpack-bench; else
    skipped "no udpack-bench in $bin" 'cargo build --release --locked -p udpack-bench'
    return 1
  fi
}

# The tables of what it printed as JSON.
bench_table() {
  jq -r '.scenarios[] | (.metrics | map({(.name): .unit}) | add) as $units | .scenario as $scenario
    | ([$scenario, "way", "min", "median", "max", "unit", "x quinn", "x tuned"] | @tsv),
      (.metrics[].name as $name | .arms | to_entries[] | .value.summary[$name] as $line
      | [$name, .key, ($line | .min, .median, .max | . * 1000 | round / 1000), $units[$name],
         ($line | .to_quinn, .to_tuned | if . == null then "-" else . * 100 | round / 100 end)] | @tsv)' "$1" | column -t -s "$(printf '\t')"
}

# ---- OpenSSH, for scp, rsync, tar and qcp. sshd runs as this user.
ssh_options=()
ssh_server() {
  local name
  for name in ssh scp ssh-keygen sshd; do have "$name" || { skipped "no $name"; return 1; }; done
  local port=$((port_base + 2)) known
  ssh-keygen -q -t ed25519 -N '' -f "$work/host"
  ssh-keygen -q -t ed25519 -N '' -f "$work/user"
  cp "$work/user.pub" "$work/authorized"
  cat >"$work/sshd.conf" <<CONF
Port $port
ListenAddress $host
HostKey $work/host
AuthorizedKeysFile $work/authorized
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
PermitRootLogin prohibit-password
PidFile none
SetEnv PATH=$PATH HOME=$work/home
Subsystem sftp internal-sftp
CONF
  known=$(cut -d' ' -f1,2 <"$work/host.pub")
  echo "[$host]:$port $known" >"$work/known"
  cat >"$work/ssh.conf" <<CONF
Host peer
  HostName $host
  Port $port
  User $(id -un)
  IdentityFile $work/user
  IdentitiesOnly yes
  IdentityAgent none
  BatchMode yes
  UserKnownHostsFile $work/known
  GlobalKnownHostsFile none
  StrictHostKeyChecking yes
  LogLevel ERROR
CONF
  # sshd wants its directory when it is root; nothing is put there.
  [ "$(id -u)" -ne 0 ] || mkdir -p /run/sshd
  start sshd "${at_server[@]}" "$(command -v sshd)" -D -e -f "$work/sshd.conf"
  ssh_options=(-F "$work/ssh.conf")
  until_works "${at_client[@]}" ssh "${ssh_options[@]}" peer true || { cat "$work/sshd.log" >&2; return 1; }
}

# ---- qcp starts its other half over ssh.
qcp_client() {
  have qcp || { skipped 'no qcp' 'cargo install qcp --locked'; return 1; }
  qcp=(env "HOME=$work/home" qcp -q --ssh-config "$work/ssh.conf" -S -F -S "$work/ssh.conf")
}

# ---- rsync, as a daemon: no encryption.
rsync_daemon() {
  have rsync || { skipped 'no rsync'; return 1; }
  local port=$((port_base + 3)) user=''
  [ "$(id -u)" -ne 0 ] || user=$'uid = root\ngid = root'
  printf 'port = %s\naddress = %s\nuse chroot = no\n%s\nlog file = /dev/null\n[files]\npath = %s\nread only = no\n' \
    "$port" "$host" "$user" "$work" >"$work/rsyncd.conf"
  start rsyncd "${at_server[@]}" rsync --daemon --no-detach --config="$work/rsyncd.conf"
  rsync_url=rsync://$host:$port/files
  until_works "${at_client[@]}" rsync "$rsync_url/rsyncd.conf"
}

# ---- nginx takes PUT over TLS 1.3.
nginx_server() {
  local name
  for name in nginx curl openssl; do have "$name" || { skipped "no $name"; return 1; }; done
  nginx -V 2>&1 | grep -q dav_module || { skipped 'nginx has no dav module'; return 1; }
  local port=$((port_base + 4)) user=''
  [ "$(id -u)" -ne 0 ] || user='user root;'
  mkdir "$work/nginx"
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=peer \
    -addext "subjectAltName=IP:$host" -keyout "$work/nginx/key.pem" -out "$work/nginx/cert.pem" 2>/dev/null
  cat >"$work/nginx/nginx.conf" <<CONF
$user
daemon off;
worker_processes auto;
pid $work/nginx/pid;
error_log $work/nginx/error.log;
events {}
http {
  access_log off;
  client_max_body_size 0;
  client_body_temp_path $work/nginx/body;
  proxy_temp_path $work/nginx/t1; fastcgi_temp_path $work/nginx/t2; scgi_temp_path $work/nginx/t3; uwsgi_temp_path $work/nginx/t4;
  server {
    listen $host:$port ssl;
    ssl_certificate $work/nginx/cert.pem;
    ssl_certificate_key $work/nginx/key.pem;
    ssl_protocols TLSv1.3;
    location / { root $work; dav_methods PUT; create_full_put_path on; }
  }
}
CONF
  start nginx "${at_server[@]}" nginx -p "$work/nginx" -e "$work/nginx/error.log" -c "$work/nginx/nginx.conf"
  nginx_url=https://$host:$port
  curl=(curl -q -sS --fail --http1.1 --tlsv1.3 --cacert "$work/nginx/cert.pem")
  until_works "${at_client[@]}" "${curl[@]}" -T "$work/nginx/nginx.conf" "$nginx_url/home/probe" || { cat "$work/nginx/error.log" >&2; return 1; }
}

# ---- a link of limited rate, with delay and loss, between two namespaces (as root): ../shared/tools/wanlink. The
# client is on side a, the server on side b; data goes from a to b.
tool=${WANLINK:-$PWD/../shared/tools/wanlink}
link_there() {
  [ -x "$tool/netlab.sh" ] || [ -f "$tool/netlab.sh" ] || { skipped "no link emulator at $tool" 'WANLINK names its directory'; return 1; }
  [ "$(id -u)" -eq 0 ] || { skipped 'no network namespaces' 'needs root'; return 1; }
  local name
  for name in ip iperf3; do have "$name" || { skipped "no $name"; return 1; }; done
  if [ -z "${WANLINK_BIN:-}" ]; then
    export WANLINK_BIN=${CARGO_TARGET_DIR:-$PWD/target}/wanlink/release/wanlink
    cargo build -q --release --locked --manifest-path "$tool/Cargo.toml" --target-dir "${WANLINK_BIN%/release/wanlink}"
  fi
}
netlab() { bash "$tool/netlab.sh" "$@"; }
# Makes the namespaces and the link: NAME RATE (Mbit/s) DELAY (ms, one way) LOSS (%, each way) QUEUE (ms).
link_up() {
  export NETLAB_A=udpack-a-$1-$$ NETLAB_B=udpack-b-$1-$$ NETLAB_RUN=$work/link
  link=(--rate "$2" --delay "$3" --loss "$4" --queue-ms "$5")
  undo() { netlab down >/dev/null 2>&1 || true; }
  netlab up "${link[@]}"
  at_client=(ip netns exec "$NETLAB_A") at_server=(ip netns exec "$NETLAB_B") host=10.77.0.2
}
# The link anew, with counters at zero: SEED; the kernel's TCP then uses CC, and remembers nothing of earlier runs.
link_anew() {
  local ns
  netlab link "${link[@]}" --seed "$1"
  for ns in "$NETLAB_A" "$NETLAB_B"; do
    ip -n "$ns" route replace 10.77.0.0/24 dev wan0 congctl lock "$2"
    ip -n "$ns" tcp_metrics flush all >/dev/null
  done
}
# What the link counted in the direction of the data since then, as JSON: packets that entered, percent that it lost
# (at random and in its queue), the queue's part of it, bytes of packets for each byte of the file ($1 bytes).
link_counts() {
  netlab stats | jq -c --argjson bytes "$1" '.a_to_b
    | {packets: .in_pkts, lost: ((.lost + .queue_drops) * 100 / ([.in_pkts, 1] | max)), queue_drops: (.queue_drops * 100 / ([.in_pkts, 1] | max)),
       sent: (.in_bytes / $bytes), late_ms: (.max_late_us / 1000)}'
}

# ---- results go to $results/NAME.jsonl, which begins anew; `about` is what all its lines share.
results_file=''
results_into() {
  results_file=$results/$1.jsonl
  : >"$results_file"
  about=$(jq -cn --arg cores "$(nproc)" --arg kernel "$(uname -r)" --arg cpu "$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1)" \
    --arg version "$("$bin/udpack-client" --version)" --arg tcp "$(cat /proc/sys/net/ipv4/tcp_congestion_control)" \
    '{machine: {cores: ($cores | tonumber), kernel: $kernel, cpu: $cpu, tcp: $tcp}, version: $version}')
}
# One run: CASE WAY ROUND UNIT VALUE [JSON]; VALUE null is a failed run.
record() {
  jq -cn --argjson about "$about" --arg case "$1" --arg way "$2" --argjson round "$3" --arg unit "$4" --argjson value "$5" \
    --argjson more "${6:-"{}"}" '{case: $case, way: $way, round: $round, unit: $unit, value: $value} + $more + $about' >>"$results_file"
}
# The table: minimum, median, maximum of each way and how often ours (way $1) is as fast: the median of the
# ratios of each round.
table() {
  jq -rs --arg ours "${1:-udpack}" '
    def median: sort | if length == 0 then null elif length % 2 == 1 then .[length / 2 | floor] else (.[length / 2 - 1] + .[length / 2]) / 2 end;
    def show: if . == null then "-" elif . >= 1000 then round | tostring else . * 1000 | round / 1000 | tostring end;
    . as $runs
    | ($runs | map(select(.way == $ours and .value != null) | {key: (.round | tostring), value}) | from_entries) as $own
    | (["way", "n", "min", "median", "max", "unit", "ours/it", "lost %"] | @tsv),
      (reduce $runs[].way as $w ([]; if index([$w]) then . else . + [$w] end))[] as $way
    | $runs | map(select(.way == $way)) | map(select(.value != null)) as $good
    | [$way, "\($good | length)/\(length)", ($good | map(.value) | min, median, max | show), (.[0].unit),
       ($good | map(select($own[.round | tostring]) | $own[.round | tostring] / .value) | median | show),
       ($good | map(.lost // empty) | median | show)] | @tsv' "$results_file" | column -t -s "$(printf '\t')"
}
# Only the ways that WAYS names.
wanted() { [ -z "${WAYS:-}" ] || [[ " $WAYS " == *" $1 "* ]]; }
