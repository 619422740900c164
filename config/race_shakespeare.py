# The race: Tiny Shakespeare by characters to a validation loss of 1.92 on the whole split, as fast as a CPU allows.
# 2 layers, 4 heads, width 128, vocabulary 65: 410,496 parameters.
# nanoGPT's CPU settings take 2,000 steps of 768 characters to get there, this takes 150 of 2,048. BENCHMARKS.md has the times.
#
#     python prepare_text.py --source=shakespeare --dataset=shakespeare_char --tokenizer=char
#     python train.py config/race_shakespeare.py
#     python train.py config/race_shakespeare.py --max_minutes=1.5        how far it gets in a minute and a half
out_dir = "out/race_shakespeare"
dataset = "shakespeare_char"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 64
norm = "rmsnorm"
mlp = "relu2"
pos = "rope"
qk_norm = True
init = "zero_proj"
tie_weights = False

batch_size = 32
gradient_accumulation_steps = 1
max_iters = 150
optimizer = "muon"
learning_rate = 0.02
embedding_lr = 0.01
head_lr = 0.01
vector_lr = 0.01
momentum = 0.9
weight_decay = 0.0
schedule = "linear"
warmup_iters = 0
min_lr = 0.0
grad_clip = 0.0

eval_interval = 0
final_eval_tokens = 0
log_interval = 10
compile = False  # compiling takes longer than the race
