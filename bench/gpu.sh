#!/usr/bin/env bash
# What only a GPU can show, in at most 8 minutes: first what must be right, side by side, then how fast it is, alone.
#
#   make check-gpu                                     what must be right, 3 minutes at most
#   make bench-gpu PEER=peer GPU_DATA=images.zip       all of it; PEER is a checkout of github.com/sail-sg/DiffMemorize
#   bash bench/gpu.sh nearest training                  these sections alone
#   DEVICE=cpu OUT=/tmp/gpu bash bench/gpu.sh          a rehearsal in tiny sizes, a minute or two on 2 cores
#
# Results come as lines of JSON, here and in OUT/gpu.jsonl, with logs beside. Each section has a limit in seconds; one
# that fails or reaches it is a line of its own, and the others go on. All of it together writes OUT/gpu-CARD.json and,
# on a GPU, the same into bench/results, which docs/gpu.md shows. DATA are photographs to search.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python} OUT=${OUT:-runs/gpu} LIMIT=460  # for all but the last line
export DEVICE=${DEVICE:-cuda} CHOSEN=" ${*:-checks nearest optimum training digits photographs} "
mkdir -p "$OUT"
: > "$OUT/gpu.jsonl"

section() {  # its name and its limit
    local status=124 start=$SECONDS limit=$(($2 < LIMIT - SECONDS ? $2 : LIMIT - SECONDS))
    [[ $CHOSEN == *" $1 "* ]] || return
    if [ $limit -gt 0 ]; then
        timeout --kill-after=5 $limit "$PYTHON" bench/gpu.py --section "$1" --out "$OUT" --device "$DEVICE" \
            --data "${DATA:-}" --peer "${PEER:-}" 2> "$OUT/$1.log" | tee -a "$OUT/gpu.jsonl"
        status=$?
    fi
    [ $status = 0 ] || printf '{"what": "failed", "name": "%s", "status": %d, "seconds": %d}\n' \
        "$1" $status $((SECONDS - start)) | tee -a "$OUT/gpu.jsonl"
}

section checks 170
section nearest 30
section optimum 20
section training 210
section digits 60
section photographs 75
"$PYTHON" bench/gpu.py --section record --out "$OUT" --device "$DEVICE"
echo "$SECONDS seconds; logs in $OUT"
! grep -qE '"what": "failed"|"ok": false' "$OUT/gpu.jsonl"
