#!/usr/bin/env bash
# What one GPU does with this project, in at most eight minutes: one table, and $OUT/gpu.json.
#
#   benchmarks/gpu.sh                    all parts (benchmarks/gpu.py says what they are)
#   benchmarks/gpu.sh step decode        some of them
#   benchmarks/gpu.sh --small            shrunken, on a CPU
#
# Needs a Python with torch, transformers 5.23 or later, peft, accelerate, gymnasium, pyarrow, pillow, tyro and rich;
# the project itself need not be installed. PYTHON names the interpreter, OUT the folder, BUDGET the seconds in all. A
# part that fails or runs out of time is reported, and the next one starts. Status: 0 if all is well, else 1.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
out=${OUT:-$root/runs/gpu}
python=${PYTHON:-python3}
budget=${BUDGET:-480}
small=
[ "${1:-}" = --small ] && small=--small && shift
parts=${*:-card agreement step decode commands tiny}
declare -A limit=([card]=40 [agreement]=75 [step]=170 [decode]=90 [commands]=60 [tiny]=300)

links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
ln -s "$root/agents" "$links/ivt_agents" # the name under which an installation knows the folder
export PYTHONPATH="$links:$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false
cd "$root" && mkdir -p "$out" || exit 1
rm -f "$out"/*.json

# An older one reads the shipped model without a word and answers at random.
"$python" - <<'CHECK' || exit 1
import transformers
from packaging.version import Version
if Version(transformers.__version__) < Version("5.23"):
    raise SystemExit(f"transformers {transformers.__version__} is too old; the project wants 5.23 or later")
CHECK

for part in $parts; do
    left=$((budget - SECONDS - 10)) # the table wants a few seconds
    allowed=${limit[$part]:?no such part}
    [ "$left" -lt "$allowed" ] && allowed=$left
    if [ "$allowed" -lt 1 ]; then
        echo "{\"error\": \"no time was left\"}" >"$out/$part.json"
        continue
    fi
    began=$SECONDS
    timeout --kill-after=5 "$allowed" "$python" -m benchmarks.gpu "$part" --out "$out" --seconds "$allowed" $small \
        >"$out/$part.log" 2>&1
    status=$?
    echo "$part: status $status after $((SECONDS - began)) s"
    if [ $status -ne 0 ]; then
        tail -n 12 "$out/$part.log" | cut -c1-300
        # A part that was stopped keeps what it had found; one that could not begin has left nothing.
        [ -e "$out/$part.json" ] || echo "{\"error\": \"status $status after $((SECONDS - began)) s\"}" >"$out/$part.json"
    fi
done
"$python" -m benchmarks.gpu table --out "$out"
