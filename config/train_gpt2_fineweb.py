# GPT-2 124M on ten billion tokens of FineWeb-Edu, one pass: train.py's own defaults, with a longer final evaluation.
# 12 layers, 12 heads, width 768, vocabulary 50,257: 124,337,664 parameters.
# Hardware: 8 GPUs. Time and loss: not measured.
#
#     python build_fineweb_shards.py
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fineweb.py
out_dir = "out/gpt2_fineweb"
dataset = "edu_fineweb10B"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

batch_size = 64
total_batch_tokens = 524288
learning_rate = 6e-4
min_lr = 6e-5
max_iters = 19073
warmup_iters = 715
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

eval_interval = 250
eval_iters = 20
final_eval_tokens = 10485760
