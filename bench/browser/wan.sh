#!/usr/bin/env bash
# A file out of headless Chromium over a link as it is between cities, made by ../shared/tools/wanlink: 100 Mbit/s, 50 ms,
# 1 % loss each way. The client of this project beside a bare stream of WebTransport, a WebSocket and a PUT by `fetch`, whose
# TCP uses the kernel's BBR; and then the latter two with CUBIC, which is what Chromium's QUIC uses, too, without a choice for
# pages. The browser is on one side of the link, the servers are on the other. As root.
#
#   bench/browser/wan.sh
#   SIZE=100M                       of the file
#   WANLINK=DIR WANLINK_BIN=FILE    the emulator's source; its binary, built if this is not set
# ROUNDS, BIN, RESULTS: see bench/lib.sh.
# shellcheck source=bench/lib.sh
. "$(dirname "$0")/../lib.sh"

have node || { skipped 'no node'; exit 0; }
have_bench || exit 2
link_there || exit 0
grep -qw bbr /proc/sys/net/ipv4/tcp_available_congestion_control || modprobe tcp_bbr 2>/dev/null || { skipped 'the kernel has no BBR' 'modprobe tcp_bbr'; exit 0; }
memory=/dev/shm
[ -d "$memory" ] || memory=${TMPDIR:-/tmp}
workspace "$memory"
link_up browser 100 25 1 50
over() { # CONTROL WAYS
  link_anew 1 "$1"
  printf '\n100 Mbit/s, 50 ms, loss 1 %% each way, queue 50 ms; TCP: %s\n' "$1"
  "${at_client[@]}" node bench/browser/streams.mjs --bin "$bin" --size "${SIZE:-100M}" --rounds "$rounds" --ways "$2" \
    --listen "$host" --server-via "${at_server[*]}" --results "$results" --name "browser-wan-$1" &
  running=$!
  wait "$running" || failed=1
  link_counts 1 | jq -r '"the link lost \(.lost * 100 | round / 100) % of the packets towards the servers"'
}
over bbr udpack,auto,tcp,bare,wss,fetch
over cubic auto,wss,fetch
exit "$failed"
