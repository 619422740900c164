# TinyStories on one GPU, with the modern recipe and baby_gpu's size, in half of its steps.
# 6 layers, 6 heads, width 384, vocabulary 50,257: 49,219,200 parameters (10.6 million of them in the blocks).
# Time and loss: not measured.
#
#     python prepare_tinystories.py
#     python train.py config/modern_gpu.py
out_dir = "out/modern_gpu"
dataset = "tinystories"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 512
norm = "rmsnorm"
mlp = "relu2"
pos = "rope"
qk_norm = True
init = "zero_proj"
tie_weights = False

batch_size = 64
gradient_accumulation_steps = 1
max_iters = 5000
optimizer = "muon"
learning_rate = 0.02
embedding_lr = 0.3
head_lr = 0.005
vector_lr = 0.01
momentum_warmup = 300
beta1 = 0.8
weight_decay = 0.01
schedule = "wsd"
decay_fraction = 0.5
warmup_iters = 50
min_lr = 0.0
grad_clip = 0.0

eval_interval = 250
eval_iters = 20
log_interval = 10
sample_prompt = "Once upon a time"
sample_interval = 1000
