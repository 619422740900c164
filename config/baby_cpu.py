# TinyStories on a laptop without a GPU, with GPT-2's blocks and AdamW.
# 4 layers, 4 heads, width 256, vocabulary 50,257: 16,144,896 parameters (3.1 million of them in the blocks).
# Time: 20.5 million tokens; two cores of an AMD EPYC train 5,630 tokens/s (without dropout), which makes an hour.
# Loss: not measured on TinyStories. On Wikipedia text after 20 minutes on one core 5.89 to 5.95, on a slower one 6.99 to
# 7.04 (BENCHMARKS.md).
#
#     python prepare_tinystories.py
#     python train.py config/baby_cpu.py
out_dir = "out/baby_cpu"
dataset = "tinystories"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 512
dropout = 0.2

batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-4
max_iters = 5000
warmup_iters = 100
beta2 = 0.99

eval_interval = 250
eval_iters = 20
log_interval = 10
sample_prompt = "Once upon a time"
sample_interval = 1000
