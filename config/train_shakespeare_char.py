# Shakespeare by characters on one GPU, nanoGPT's settings and its published best validation loss of 1.4697.
# 6 layers, 6 heads, width 384, vocabulary 65: 10,745,088 parameters. On a CPU make it smaller, as nanoGPT does:
# see "Coming from nanoGPT" in README.md.
#
#     python prepare_text.py --source=shakespeare --dataset=shakespeare_char --tokenizer=char
#     python train.py config/train_shakespeare_char.py
out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2

batch_size = 64
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-4
max_iters = 5000
lr_decay_iters = 5000
warmup_iters = 100
beta2 = 0.99

eval_interval = 250
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # it overfits: best.pt is what counts
