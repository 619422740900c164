# Tiny Shakespeare by characters to a validation loss of 1.92 on the whole split, as fast as a CPU allows.
# 1 layer, 2 heads, width 80, vocabulary 65: 97,680 parameters.
# Time: 5 to 8 s on two cores of an Intel Xeon, float32. Validation loss: 1.886 to 1.914 (eight seeds). It trains 150 steps of
# 2,048 characters, where nanoGPT's CPU settings take 2,000 steps of 768. BENCHMARKS.md has the comparison.
#
#     python prepare_text.py --source=shakespeare --dataset=shakespeare_char --tokenizer=char
#     python train.py config/race_shakespeare.py
out_dir = "out/race_shakespeare"
dataset = "shakespeare_char"

n_layer = 1
n_head = 2
n_embd = 80
block_size = 64
norm = "rmsnorm"
mlp = "swiglu"
mlp_hidden = 256
pos = "rope"
rope_base = 100.0
qk_norm = True
tie_weights = False

batch_size = 32
gradient_accumulation_steps = 1
max_iters = 150
optimizer = "muon"
learning_rate = 0.04
embedding_lr = 0.01
head_lr = 0.01
vector_lr = 0.01
momentum = 0.8
beta2 = 0.9
weight_decay = 0.0
schedule = "wsd"
decay_fraction = 0.55
warmup_iters = 0
min_lr = 0.0
grad_clip = 0.0

eval_interval = 0
eval_iters = 1  # the final evaluation on the whole split follows
final_eval_tokens = 0
log_interval = 10
compile = False  # compiling takes longer than the race
