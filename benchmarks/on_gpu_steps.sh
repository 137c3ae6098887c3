# The steps of on_gpu.sh, in order. $python, $device, $minutes and $tiny are set there.
tests() { # tests NAME WEIGHT SELECTION: of what needs a GPU
  step "$1" "$2" env TEST_DEVICE="$device" "$python" -m pytest -q -p no:cacheprovider -m gpu \
    tests/test_gpu.py -k "$3"
}
measure() { # measure NAME WEIGHT SCRIPT OPTION...
  local name=$1 weight=$2 script=$3
  shift 3
  step "$name" "$weight" "$python" "benchmarks/$script.py" --device "$device" "$@"
}
if [ -n "$tiny" ]; then
  rounds=2 steps=1 blocks=2 head_1=64,512,32,48 head_2=64,515,32,48 shape=tiny llama=tiny_llama decode=tiny
  products=(--vocabulary 515 --width 32 --rows 16 32) load=(--tiny) batches=1
  learns="precision_learns and fp32" captured="captured_step and None" late="$captured and graph"
else
  rounds=20 steps=8 blocks=4 head_1=8192,128256,2048,4096 head_2=65536,50257,768,1024
  shape=gpt2 llama=124m decode=1.2b products=() load=(--repeats 1) batches="1 8 32"
  learns=precision_learns captured="captured_step and not int8" late="captured_step and int8"
  [ "$minutes" -ge 12 ] || rounds=10 batches=1
fi
turns=$((rounds < 5 ? rounds : rounds / 4)) # of whole training steps, `steps` of them at a time

# Do the kernels compute what they should, and does each precision learn?
tests kernels 60 "compiled_kernel or cached_teacher or head_equals"
tests precisions 80 "$learns"
# The head (G1, G2), beside TRL, Liger and logits in full.
measure products 25 products "${products[@]}" --rounds "$rounds" --save
measure head_1 60 distillation_head --shapes "$head_1" --rounds "$rounds" --save
measure head_2 75 distillation_head --shapes "$head_2" --rounds "$rounds" --save
# A step: what keeps documents apart, eager and compiled; what a new shape costs.
measure step 90 attention_step --shape "$llama" --rounds "$rounds" --save
# Does the meter read what is known? Which steps are captured?
measure known_load 60 gpu_known_load "${load[@]}" --only flops spin delays loop
tests captured 50 "$captured"
tests captured_int8 40 "$late"
measure decode_compiled 70 quantized_decode --shapes "$decode" --batches 1 --blocks "$blocks" \
  --decode compile --save
# Whole steps beside peers: training (G5), distillation (G3), from a cache (G4), decoding (G8).
measure training 90 precision --shapes "$shape" --rounds "$turns" --steps "$steps" --probes 0 --save
measure distillation 90 distillation_step --shapes "$shape" --rounds "$turns" --steps "$steps" \
  --save
measure cached 50 cached_step --shape "$shape" --rounds "$rounds" --save
# shellcheck disable=SC2086
measure decode 90 quantized_decode --shapes "$decode" --batches $batches --blocks "$blocks" --save
