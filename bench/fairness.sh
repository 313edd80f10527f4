#!/usr/bin/env bash
# How an upload shares a link of 100 Mbit/s and 50 ms with others, and how much of its queue it fills when alone.
#
#   bench/fairness.sh [--parallel] [CASE…]   default: all cases; --parallel: four side by side
#   bench/fairness.sh --list                 the cases
#   RUN=60                                   seconds that two flows run beside each other
# BIN, RESULTS: see bench/lib.sh; ROUNDS=3. The first flow is alone for 5 s. Flows are counted where they arrive, once a second, by
# what the kernel says of the receiving process (/proc/PID/io): bytes written to the file for ours, bytes read from the
# socket for iperf3. The standing queue is the median of pings through the loaded link, less that of the idle one, in
# round-trip times of the idle link, which is in bandwidth-delay products.
ROUNDS=${ROUNDS:-3}
# shellcheck source=bench/lib.sh
. "$(dirname "$0")/lib.sh"

# case, first flow, second flow, drop-tail queue (ms; 50 are one bandwidth-delay product)
cases='alone-1bdp        udpack -      50
alone-4bdp        udpack -      200
cubic-first-1bdp  cubic  udpack 50
cubic-first-4bdp  cubic  udpack 200
udpack-first-1bdp udpack cubic  50
udpack-first-4bdp udpack cubic  200
two-1bdp          udpack udpack 50
two-4bdp          udpack udpack 200'
rate=100 rtt=50 run=${RUN:-60} alone=5 settle=10

parallel=0 chosen=()
while [ $# -gt 0 ]; do
  case $1 in
    --list) echo "$cases"; exit 0 ;;
    --parallel) parallel=1 ;;
    -*) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2 ;;
    *) grep -q "^$1 " <<<"$cases" || { echo "no such case: $1"; exit 2; }; chosen+=("$1") ;;
  esac
  shift
done
[ ${#chosen[@]} -gt 0 ] || mapfile -t chosen < <(cut -d' ' -f1 <<<"$cases")
link_there || exit 0
have ping || { skipped 'no ping'; exit 0; }
if [ ${#chosen[@]} -gt 1 ]; then
  side_by_side "$((parallel + 1))" "${chosen[@]/#/bench/fairness.sh }"
  exit "$failed"
fi

case=${chosen[0]}
read -r _ first second queue <<<"$(grep "^$case " <<<"$cases")"
memory=/dev/shm
[ -d "$memory" ] || memory=${TMPDIR:-/tmp}
workspace "$memory"
results_into "fairness-$case"
link_up "${case//-/}" "$rate" "$((rtt / 2))" 0 "$queue"
# More than the link carries in the time; a hole, for it is read only.
truncate -s $(((run + alone + 10) * rate * 1000000 / 8 * 2)) "$work/file"

# Starts flow NUMBER of KIND; its receiver and the counter to read go to receivers and counters.
receivers=() counters=() flows=()
flow() {
  local port=$((port_base + 10 + $1))
  if [ "$2" = udpack ]; then
    udpack_server "$work/in-$1" "$port"
    receivers+=("$pid") counters+=(wchar)
    start "client-$1" "${at_client[@]}" "${put[@]}" "$work/file" --to "$host:$port" --keys "$work/keys"
  else
    start "iperf-$1" "${at_server[@]}" iperf3 -s -p "$port"
    receivers+=("$pid") counters+=(rchar)
    until_works listens "$port"
    start "client-$1" "${at_client[@]}" iperf3 -c "$host" -p "$port" -t $((run + alone + 30))
  fi
  flows+=("$pid")
}
listens() { "${at_server[@]}" ss -Htln "sport = :$1" | grep -q .; }
arrived() { awk -v name="${counters[$1]}:" '$1 == name { print $2 }' "/proc/${receivers[$1]}/io"; }
pings() { sed -n 's/.*time=\([0-9.]*\) ms.*/\1/p' "$1" | jq -sc 'sort | {median: .[length / 2 | floor], p95: .[length * 0.95 | floor]}'; }

echo "$case: $rate Mbit/s, $rtt ms, queue $queue ms; $first and $second for $run s, $rounds rounds"
for round in $(seq "$rounds"); do
  link_anew "$round" cubic
  "${at_client[@]}" ping -q -c 20 -i 0.05 "$host" >/dev/null
  "${at_client[@]}" ping -c 40 -i 0.05 "$host" >"$work/idle"
  receivers=() counters=() flows=()
  flow 0 "$first"
  if [ "$second" != - ]; then
    sleep "$alone"
    flow 1 "$second"
  else
    start ping-loaded "${at_client[@]}" ping -i 0.05 "$host"
    flows+=("$pid")
    : >"$work/ping-loaded.log"
  fi
  # A line a second: its time, what each receiver has.
  : >"$work/samples"
  begun=$EPOCHREALTIME
  for second_now in $(seq 0 "$run"); do
    sleep "$(awk "BEGIN { wait = $begun + $second_now - $EPOCHREALTIME; print (wait > 0) ? wait : 0 }")"
    line=$EPOCHREALTIME
    for number in "${!receivers[@]}"; do line+=" $(arrived "$number")"; done
    echo "$line" >>"$work/samples"
    # The first seconds of a flow alone are its start-up.
    if [ "$second" = - ] && [ "$second_now" = "$settle" ]; then : >"$work/ping-loaded.log"; fi
  done
  for pid in "${flows[@]}"; do stop "$pid"; done
  for pid in "${receivers[@]}"; do stop "$pid"; done
  rm -rf "$work"/in-*

  names=$(jq -cn --arg first "$first" --arg second "$second" '[$first] + (if $second == "-" then [] elif $second == $first then ["\($second)-2"] else [$second] end)')
  jq -Rsc --argjson names "$names" --argjson settle "$settle" '
    split("\n") | map(select(. != "") | split(" ") | map(tonumber)) as $rows
    | [range($names | length) as $flow | [range(1; $rows | length) as $i
        | ($rows[$i][$flow + 1] - $rows[$i - 1][$flow + 1]) / ($rows[$i][0] - $rows[$i - 1][0]) / 1e6]] as $series
    | range($names | length) as $flow
    | {way: $names[$flow], rate: ($series[$flow] | add / length), late: ($series[$flow][$settle:] | add / length),
       share: (($series[$flow] | add) / ($series | map(add) | add) * 100),
       late_share: (($series[$flow][$settle:] | add) / ($series | map(.[$settle:] | add) | add) * 100),
       series: ($series[$flow] | map(. * 1000 | round / 1000))}' "$work/samples" >"$work/flows"
  counts=$(link_counts 1)
  while read -r line; do
    more=$(jq -c '{rate, late, late_share, series}' <<<"$line")
    unit='% of the bytes' value=$(jq .share <<<"$line")
    if [ "$second" = - ]; then
      unit='MB/s' value=$(jq .rate <<<"$line")
      more=$(jq -c --argjson idle "$(pings "$work/idle")" --argjson loaded "$(pings "$work/ping-loaded.log")" --argjson counts "$counts" \
        '{rate, late, series, idle: $idle, loaded: $loaded, queue: (($loaded.median - $idle.median) / $idle.median), lost: $counts.lost}' <<<"$line")
    fi
    way=$(jq -r .way <<<"$line")
    record "$case" "$way" "$round" "$unit" "$value" "$more"
    jq -r --arg round "$round" --arg way "$way" '"round \($round): \($way): \(.rate * 100 | round / 100) MB/s, from second '$settle' on \(.late * 100 | round / 100)"
      + (if .queue then "; standing queue \(.queue * 100 | round / 100) BDP (ping \(.idle.median) to \(.loaded.median) ms)"
         else ", \(.late_share * 10 | round / 10) % of the bytes" end)' <<<"$more"
  done <"$work/flows"
done
table
