# GPT-2 124M on OpenWebText: nanoGPT's run, on a number of GPUs that divides the 40 micro-batches of a step.
# 12 layers, 12 heads, width 768, vocabulary 50,257: 124,337,664 parameters.
# Time and loss: not measured here. nanoGPT published a validation loss of about 2.85 after 600,000 steps, four days on
# eight A100 GPUs.
#
#     python prepare_text.py --source=openwebtext        38 GB of text
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
out_dir = "out/gpt2"
dataset = "openwebtext"

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

batch_size = 12
gradient_accumulation_steps = 5 * 8
learning_rate = 6e-4
min_lr = 6e-5
max_iters = 600000
warmup_iters = 2000
weight_decay = 1e-1
beta2 = 0.95

eval_interval = 1000
eval_iters = 200
log_interval = 10
