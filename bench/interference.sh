#!/usr/bin/env bash
# How long messages take beside an upload that fills a link of 100 Mbit/s and 50 ms, without loss and with 1 % each
# way: `udpack-bench interference`, whose two sides are at the two ends of the link.
#
#   bench/interference.sh [LOSS…]   default: 0 1, side by side
# ROUNDS, BIN, RESULTS: see bench/lib.sh. SECONDS_EACH=10: seconds without the upload, and as many beside it.
# shellcheck source=bench/lib.sh
. "$(dirname "$0")/lib.sh"

[ $# -gt 0 ] || set -- 0 1
link_there || exit 0
have_bench || exit 0
if [ $# -gt 1 ]; then
  side_by_side 2 "${@/#/bench/interference.sh }"
  exit "$failed"
fi
memory=/dev/shm
[ -d "$memory" ] || memory=${TMPDIR:-/tmp}
workspace "$memory"
link_up "interference${1//./}" 100 25 "$1" 50
link_anew 1 bbr
echo "interference: 100 Mbit/s, 50 ms, loss $1 % each way, queue 50 ms"
out=$results/interference-$1.json
"$bench" interference --only "udpack" --rounds "$rounds" --seconds "${SECONDS_EACH:-10}" --dir "$work" --json --listen "$host" \
  --client-via "${at_client[*]}" --server-via "${at_server[*]}" >"$work/out.json" &
running=$!
wait "$running"
mv "$work/out.json" "$out"
bench_table "$out"
