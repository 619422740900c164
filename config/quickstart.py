# A small model of children's stories, from nothing to a printed story in about two minutes.
# 4 layers, 2 heads, width 128: vocabulary 849, 896,256 parameters. The stories are made by prepare_tinystories.py --synthetic=True.
#
#     python train.py config/quickstart.py
out_dir = "out/quickstart"
dataset = "tinystories_synthetic"
sample_prompt = "Once upon a time"

n_layer = 4
n_head = 2
n_embd = 128
block_size = 256
norm = "rmsnorm"
mlp = "relu2"
pos = "rope"
attn = "manual"  # at this size faster on a CPU than the fused kernel

batch_size = 16
gradient_accumulation_steps = 1
max_iters = 900
optimizer = "muon"
learning_rate = 3e-3
min_lr = 0.0
schedule = "linear"
warmup_iters = 20
beta2 = 0.95

eval_interval = 150
eval_iters = 4
log_interval = 25
compile = False
