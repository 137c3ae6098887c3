# The steps of on_gpu.sh, in order. $python, $device, $minutes and $tiny are set there.
tests() { # tests NAME WEIGHT SELECTION: of what needs a GPU
  step "$1" "$2" env TEST_DEVICE="$device" "$python" -m pytest -v -p no:cacheprovider -m gpu \
    tests/test_gpu.py -k "$3"
}
measure() { # measure NAME WEIGHT SCRIPT OPTION...
  local name=$1 weight=$2 script=$3
  shift 3
  step "$name" "$weight" "$python" "benchmarks/$script.py" --device "$device" "$@"
}
if [ -n "$tiny" ]; then
  rounds=2 steps=1 blocks=2 batches=(1) head_1=64,512,32,48 head_2=64,515,32,48
  products=(--vocabulary 515 --width 32 --rows 16 32) load=(--tiny) formats=(bf16 int8)
  training=tiny llama=tiny_llama distillation=tiny decode=tiny ways=tiny hours=check sizes=(2)
  learns="precision_learns and fp32" captured="captured_step and None" late="$captured and graph"
else
  rounds=20 steps=8 blocks=4 batches=(1 8 32) head_1=8192,128256,2048,4096
  head_2=65536,50257,768,1024 products=() load=(--repeats 1) sizes=(16 32)
  # the narrowest first, after what they are read against; a share of the time may end before all
  formats=(bf16 int4_weight_only int8_weight_only nf4 int8)
  training=gpt2 llama=124m distillation=gpt2 decode=1.2b ways=124m hours=minutes
  learns=precision_learns captured="captured_step and not int8" late="captured_step and int8"
  [ "$minutes" -ge 12 ] || { rounds=10 batches=(1) sizes=(16); }
fi
turns=$((rounds < 6 ? rounds : 6)) # blocks of whole steps: an interval of the median needs six

# Do the kernels compute what they should, and does each precision learn?
tests kernels 60 "compiled_kernel or cached_teacher or head_equals"
tests precisions 80 "$learns"
# The head beside TRL, Liger and logits in full.
measure products 25 products "${products[@]}" --rounds "$rounds" --save
measure head_1 60 distillation_head --shapes "$head_1" --rounds "$rounds" --save
measure head_2 75 distillation_head --shapes "$head_2" --rounds "$rounds" --save
# A step: what keeps documents apart, eager and compiled; what a new shape costs.
measure step 120 attention --ways --shape "$llama" --rounds "$rounds" --save
# Does the meter read what is known? Which steps are captured?
measure known_load 60 gpu_known_load "${load[@]}" --only flops spin delays loop
tests captured 50 "$captured"
tests captured_int8 40 "$late"
measure decode_compiled 70 quantized_decode --shapes "$decode" --batches 1 --blocks "$blocks" \
  --formats "${formats[@]}" --decode compile --save
measure decode_ways 40 decode_ways --shape "$ways" --batches 1 8 --blocks "$blocks" --save
# Whole steps beside peers: training, distillation, from a cache, decoding.
measure training 100 precision --shapes "$training" --rounds "$turns" --steps "$steps" \
  --probes 0 --save
measure distillation 130 distillation_step --shapes "$distillation" --rounds "$turns" \
  --steps "$steps" --arms ours trl "trl, tuned" --batches "${sizes[@]}" --save
measure cached 60 cached_step --shape "$distillation" --rounds "$turns" --steps "$steps" --save
measure decode 90 quantized_decode --shapes "$decode" --batches "${batches[@]}" \
  --blocks "$blocks" --formats "${formats[@]}" --save
# Hours to a loss; if there is time for no more, all systems at full length are saved.
measure hours 100 hours_to_quality --size "$hours" --seeds 0 \
  --systems trainer_rate ours ours+short+stack --save
