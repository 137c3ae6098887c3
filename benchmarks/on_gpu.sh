#!/usr/bin/env bash
# A quarter of an hour on a GPU: kernels first, then what the project claims beside its peers.
#
#   benchmarks/on_gpu.sh [--minutes 14] [--device cpu --tiny] [--only "NAME ..."] [--list]
#                        [--folder DIR] [--archive FILE] [--steps FILE]
#
# Each step is a process of its own with a share of the minutes; what one leaves goes to those after
# it. A step that fails or overruns its share never ends the rest. Results and output lie in one
# folder (--folder, else $OUT, else benchmarks/results/on_gpu-DATE) as they come, and `summary.txt`
# there says after each step what ran. --archive packs the folder into one .tar.gz after each step.
# --steps takes the steps from another file. It exits 1 where a step failed.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
minutes=14 device=cuda tiny= only= list= archive= steps=$here/on_gpu_steps.sh
folder=${OUT:-$here/results/on_gpu-$(date -u +%F)}
usage() { sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }
while [ $# -gt 0 ]; do
  case $1 in
    --tiny) tiny=1 ;;
    --list) list=1 ;;
    -h | --help) usage; exit 0 ;;
    --minutes | --device | --only | --folder | --archive | --steps)
      [ $# -ge 2 ] || { echo "on_gpu: $1 needs a value" >&2; exit 2; }
      printf -v "${1#--}" %s "$2"; shift ;;
    *) echo "on_gpu: no option '$1'" >&2; usage >&2; exit 2 ;;
  esac
  shift
done
[[ $minutes =~ ^[1-9][0-9]*$ ]] || { echo "on_gpu: --minutes takes a whole number" >&2; exit 2; }
case $device in cuda | cpu) ;; *) echo "on_gpu: --device takes cuda or cpu" >&2; exit 2 ;; esac
[ -r "$steps" ] || { echo "on_gpu: no file '$steps'" >&2; exit 2; }

names=() weights=() commands=()
step() { # step NAME WEIGHT COMMAND...: WEIGHT is its share, about the seconds it takes
  [[ -z $only || " $only " == *" $1 "* ]] || return 0
  names+=("$1") weights+=("$2")
  shift 2
  commands+=("$(printf '%q ' "$@")")
}
# shellcheck source=benchmarks/on_gpu_steps.sh
source "$steps"
[ ${#names[@]} -gt 0 ] || { echo "on_gpu: no step is named '$only'" >&2; exit 2; }
if [ -n "$list" ]; then
  for at in "${!names[@]}"; do echo "${names[$at]} ${weights[$at]} ${commands[$at]}"; done
  exit 0
fi

mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
if [ -n "$archive" ]; then
  mkdir -p "$(dirname "$archive")" && archive=$(cd "$(dirname "$archive")" && pwd)/${archive##*/}
fi
cd "$here/.." || exit 2
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
row='%-20s %8s %8s %5s  %s\n'
summary=$folder/summary.txt
# shellcheck disable=SC2059
printf "$row" step seconds limit exit file | tee "$summary"
total=0 failed=0 end=$((SECONDS + 60 * minutes))
for weight in "${weights[@]}"; do total=$((total + weight)); done
for at in "${!names[@]}"; do
  name=${names[$at]} weight=${weights[$at]} left=$((end - SECONDS))
  limit=$((left * weight / total)) total=$((total - weight)) started=$SECONDS
  [ "$limit" -gt 0 ] || limit=1
  # what it saves lies in a folder of its own: two steps may run one script
  BENCHMARK_RESULTS=$folder/$name timeout --kill-after=5 "$limit" \
    bash -c "${commands[$at]}" >"$folder/$name.txt" 2>&1
  code=$?
  [ "$code" -eq 0 ] || failed=1
  saved=$(cd "$folder" && find "$name" -name '*.json' 2>/dev/null | sort | tail -1)
  # shellcheck disable=SC2059
  printf "$row" "$name" $((SECONDS - started)) "$limit" "$code" "${saved:-$name.txt}" |
    tee -a "$summary"
  if [ -n "$archive" ]; then
    tar -czf "$archive.part" -C "$folder" . 2>/dev/null && mv "$archive.part" "$archive"
  fi
done
echo "124 and 137: out of its time; results are in $folder"
exit "$failed"
