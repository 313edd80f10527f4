#!/usr/bin/env bash
# Everything that docs/BENCHMARKS.md shows: builds, measures, fills the document and draws its charts. As root, on a
# machine with nothing else to do, an hour and a quarter.
#
#   bench/all.sh [PART…]   default: all of bench growth peers netns small-files links fast-links interference document; also: browser networks sync
# ROUNDS, BIN, RESULTS: see bench/lib.sh. A part that fails does not keep the others from running.
set -eu
cd "$(dirname "$0")/.."

if [ -z "${BIN:-}" ]; then cargo build --release --locked -p udpack-cli -p udpack-bench; fi
# shellcheck source=bench/lib.sh
. bench/lib.sh
have_bench || exit 2
workspace "${TMPDIR:-/tmp}"

# A scenario of udpack-bench: NAME SCENARIO OPTION…
scenario() {
  local name=$1
  shift
  "$bench" "$@" --rounds "$rounds" --json >"$work/$name.json" &
  running=$!
  wait "$running" || { failed=1; return 0; }
  mv "$work/$name.json" "$results/$name.json"
  bench_table "$results/$name.json"
}
script() {
  "$@" &
  running=$!
  wait "$running" || failed=1
}
part() {
  case $1 in
    bench)
      scenario bench-stream stream
      scenario bench-upload upload
      scenario bench-messages-1 messages --sockets 1
      scenario bench-messages-100 messages --sockets 100
      scenario bench-ping-1 ping --sockets 1
      scenario bench-ping-100 ping --sockets 100
      scenario bench-handshakes handshakes
      scenario bench-idle idle
      scenario bench-fanout fanout
      ;;
    growth)
      "$bench" growth --json >"$work/growth.json" &
      running=$!
      if wait "$running"; then mv "$work/growth.json" "$results/growth.json"; else failed=1; fi
      ;;
    peers) script bench/peers.sh ;;
    netns) script bench/peers.sh --netns ;;
    small-files) script bench/small-files.sh ;;
    # Two links at a time, those that take longest first: with four the processors are nearly busy, which costs who is not in
    # the kernel a tenth of the rate.
    links)
      local all
      mapfile -t all < <({ bench/wan.sh --list | awk '$2 <= 100 { print $6 / $2, "bench/wan.sh", $1 }' | sort -rn | cut -d' ' -f2-
        bench/fairness.sh --list | awk '{ print "bench/fairness.sh", $1 }'; })
      side_by_side 2 "${all[@]}"
      ;;
    fast-links) script bench/wan.sh 500M-20ms-0.1 1G-10ms-0 ;;
    interference) script bench/interference.sh ;;
    # Not among the default parts: it prints its verdicts and fills nothing.
    sync) script bench/sync.sh ;;
    # Nor are these: they need Chromium, Node and what bench/browser/peers.mjs names.
    browser)
      script node bench/browser/streams.mjs --bin "$bin" --rounds "$rounds" --results "$results"
      script node bench/browser/peers.mjs --bin "$bin" --rounds "$rounds" --results "$results"
      script node bench/browser/latency.mjs --bin "$bin" --results "$results"
      script bench/browser/wan.sh
      ;;
    # Nothing of the document, but whether all of it works without UDP, and how much later.
    networks) script bench/networks.sh ;;
    document) "$bench" document "$results" || failed=1 ;;
    *) echo "no such part: $1" >&2; exit 2 ;;
  esac
}
[ $# -gt 0 ] || set -- bench growth peers netns small-files links fast-links interference document
for name in "$@"; do
  begun=$SECONDS
  printf '\n==> %s\n' "$name"
  part "$name"
  printf '<== %s: %d s\n' "$name" $((SECONDS - begun))
done
[ "$failed" -eq 0 ] || echo 'something FAILED: see above'
exit "$failed"
