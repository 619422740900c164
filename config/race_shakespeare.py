# Tiny Shakespeare by characters to a validation loss of 1.92 on the whole split, as fast as a CPU allows.
# 2 layers, 4 heads, width 128, vocabulary 65: 410,496 parameters.
# Time: 7 s on two cores of an AMD EPYC. Validation loss: 1.88 to 1.90. It trains 150 steps of 2,048 characters, where
# nanoGPT's CPU settings take 2,000 steps of 768. BENCHMARKS.md has the comparison.
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
