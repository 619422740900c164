# Shakespeare by characters on one GPU, with nanoGPT's settings.
# 6 layers, 6 heads, width 384, vocabulary 65: 10,745,088 parameters.
# Time and loss: not measured on a GPU. nanoGPT published a best validation loss of 1.4697.
# docs/nanogpt.md has nanoGPT's smaller settings for a CPU: 46 s on two cores of an AMD EPYC, validation loss 1.91.
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
