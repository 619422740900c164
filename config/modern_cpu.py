# TinyStories on a laptop without a GPU, with the modern recipe, in a size that suits twenty minutes.
# 6 layers, 2 heads, width 128, vocabulary 50,257: 14,047,104 parameters (1.2 million of them in the blocks).
# Time: twenty minutes by the clock. --max_minutes sets another time, and the learning rate still falls to its end.
# Loss: not measured on TinyStories. On Wikipedia text, after 20 minutes on one core of an Intel Xeon without AMX, 5.83 to 5.89
# (still with beta1=0.9), and 6.13 to 6.18 with 4 layers of width 256 and the recipe before (BENCHMARKS.md). For hours, a wider
# model may be better: not measured.
#
#     python prepare_tinystories.py
#     python train.py config/modern_cpu.py
out_dir = "out/modern_cpu"
dataset = "tinystories"

n_layer = 6
n_head = 2
n_embd = 128
block_size = 256
norm = "rmsnorm"
mlp = "relu2"
pos = "rope"
qk_norm = True
init = "zero_proj"
tie_weights = False

batch_size = 8
gradient_accumulation_steps = 1
max_minutes = 20.0
optimizer = "muon"
learning_rate = 0.02
embedding_lr = 0.7
head_lr = 0.01
vector_lr = 0.01
momentum_warmup = 300
beta1 = 0.8
weight_decay = 0.0
schedule = "wsd"
decay_fraction = 0.6
warmup_iters = 20
min_lr = 0.0
grad_clip = 0.0

eval_interval = 500
eval_iters = 20
log_interval = 20
sample_prompt = "Once upon a time"
