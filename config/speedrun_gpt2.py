# GPT-2's size on 2.4 billion tokens of FineWeb, on 8 GPUs, for the loss that the classic recipe reaches in 10 billion.
# 12 layers, 12 heads, width 768, vocabulary 50,257: 162,148,608 parameters (85 million of them in the blocks).
# Time and loss: not measured. The goal is 3.28 on FineWeb's validation tokens. The public logs of modded-nanogpt (track 1,
# 2024-11-06, one seed) have 3.3274 after 3,200 and 3.2762 after 4,578 steps of 524,288 tokens for a model with the same
# parts: RoPE, QK-norm, ReLU squared, zero-initialised projections, untied head and Muon. Its later records add value
# residuals, shortcuts and a softcap, which this model lacks, and a momentum warmup, which it has. Rates, warmup and
# weight decay here are this repository's, beta1 is nanochat's. The shards are the ones of that record.
#
#     python build_fineweb_shards.py --pretokenized=fineweb10B --max_tokens=2_600_000_000
#     torchrun --standalone --nproc_per_node=8 train.py config/speedrun_gpt2.py
out_dir = "out/speedrun_gpt2"
dataset = "fineweb10B"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
norm = "rmsnorm"
mlp = "relu2"
pos = "rope"
qk_norm = True
init = "zero_proj"
tie_weights = False

batch_size = 64
total_batch_tokens = 524288
max_iters = 4578
optimizer = "muon"
learning_rate = 0.02
embedding_lr = 0.3
head_lr = 0.0025
vector_lr = 0.01
momentum_warmup = 300
beta1 = 0.8
weight_decay = 0.01
schedule = "wsd"
decay_fraction = 0.5
warmup_iters = 100
min_lr = 0.0
grad_clip = 0.0

eval_interval = 125
eval_iters = 20
final_eval_tokens = 10485760
