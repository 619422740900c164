# Tiny Shakespeare by characters to a validation loss of 1.92 on the whole split, as fast as a CPU allows.
# 2 layers, 4 heads, width 128, vocabulary 65: 412,544 parameters.
# Time: 14 s on two cores of an AMD EPYC without bfloat16. Validation loss: 1.89 to 1.91. It trains 140 steps of 1,024
# characters, where nanoGPT's CPU settings take 2,000 steps of 768. BENCHMARKS.md has the comparison.
#
#     python prepare_text.py --source=shakespeare --dataset=shakespeare_char --tokenizer=char
#     python train.py config/race_shakespeare.py
#     python train.py config/race_shakespeare.py --max_minutes=1.5        a minute and a half of training
out_dir = "out/race_shakespeare"
dataset = "shakespeare_char"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 64
norm = "rmsnorm"
mlp = "swiglu"
pos = "rope"
rope_base = 100.0
qk_norm = True
tie_weights = False

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 140
optimizer = "muon"
learning_rate = 0.025
embedding_lr = 0.01
head_lr = 0.01
vector_lr = 0.01
momentum = 0.8
beta2 = 0.9
weight_decay = 0.0
schedule = "wsd"
decay_fraction = 0.7
warmup_iters = 0
min_lr = 0.0
grad_clip = 0.0

eval_interval = 0
eval_iters = 1  # the final evaluation on the whole split follows
final_eval_tokens = 0
log_interval = 10
compile = False  # compiling takes longer than the race
