# A model that answers in turns: the chat mix, with the modern recipe, on a laptop without a GPU.
# 4 layers, 4 heads, width 256, vocabulary 50,257: 28,879,616 parameters (3.1 million of them in the blocks).
# Time: twenty minutes by the clock; --max_minutes sets another. Loss: not measured.
# Sizes for one GPU, not measured: --n_layer=6 --n_head=6 --n_embd=384 --batch_size=64
#
#     python prepare_text.py --source=chat --allow_synthetic=True
#     python train.py config/train_chat.py
#     python sample.py --out_dir=out/chat --chat
out_dir = "out/chat"
dataset = "chat"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 512
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
embedding_lr = 0.1
head_lr = 0.01
vector_lr = 0.01
weight_decay = 0.0
schedule = "wsd"
decay_fraction = 0.6
warmup_iters = 20
min_lr = 0.0
grad_clip = 0.0

eval_interval = 250
eval_iters = 20
log_interval = 20
sample_prompt = "User: What is 7 plus 5?\nAssistant:"
