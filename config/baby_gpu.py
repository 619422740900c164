# TinyStories on one GPU, with GPT-2's blocks and AdamW.
# 6 layers, 6 heads, width 384, vocabulary 50,257: 30,117,120 parameters (10.6 million of them in the blocks).
# Time and loss: not measured.
#
#     python prepare_tinystories.py
#     python train.py config/baby_gpu.py
out_dir = "out/baby_gpu"
dataset = "tinystories"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 512
dropout = 0.2

batch_size = 64
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-4
max_iters = 10000
warmup_iters = 100
beta2 = 0.99

eval_interval = 250
eval_iters = 20
log_interval = 10
sample_prompt = "Once upon a time"
sample_interval = 1000
