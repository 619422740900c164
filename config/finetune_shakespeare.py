# Fine-tunes GPT-2 XL on Shakespeare with nanoGPT's settings, on one GPU: 20 steps, and best.pt keeps the best weights.
# 48 layers, 25 heads, width 1600, vocabulary 50,257: 1,557,611,200 parameters.
# Time and loss: not measured. For a smaller GPU add --init_from=gpt2, or --lora_rank=8 --learning_rate=3e-4, which trains a
# hundredth of the weights.
#
#     python prepare_text.py --source=shakespeare
#     python train.py config/finetune_shakespeare.py
out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"

n_layer = 48
n_head = 25
n_embd = 1600
bias = True

batch_size = 1
gradient_accumulation_steps = 32  # 32,768 tokens per step; Shakespeare has 301,966, so 20 steps are about two epochs
max_iters = 20
learning_rate = 3e-5
decay_lr = False

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False
