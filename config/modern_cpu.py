# TinyStories on a laptop without a GPU, with the modern recipe and baby_cpu's size.
# 4 layers, 4 heads, width 256, vocabulary 50,257: 28,879,616 parameters (3.1 million of them in the blocks).
# Time: twenty minutes by the clock. --max_minutes sets another time, and the learning rate still falls to its end.
# Loss: not measured on TinyStories. On Wikipedia text, after 20 minutes on one core of an AMD EPYC without bfloat16, 6.47 to
# 6.53, where baby_cpu reaches 6.99 to 7.04. With an embedding rate of 0.1 and without the momentum's warmup, on an EPYC
# with bfloat16, 5.55 to 5.58 against 5.89 to 5.95 (BENCHMARKS.md).
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
