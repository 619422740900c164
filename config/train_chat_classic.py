# A model that answers in turns: the chat mix, with GPT-2's blocks and AdamW, for comparison with config/train_chat.py.
# 4 layers, 4 heads, width 256, vocabulary 50,257: 16,144,896 parameters (3.1 million of them in the blocks).
# Time: twenty minutes by the clock on a laptop without a GPU, as config/train_chat.py. Loss: not measured.
#
#     python prepare_text.py --source=chat --allow_synthetic=True
#     python train.py config/train_chat_classic.py
#     python sample.py --out_dir=out/chat_classic --chat
out_dir = "out/chat_classic"
dataset = "chat"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 512

batch_size = 8
gradient_accumulation_steps = 1
max_minutes = 20.0
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99

eval_interval = 250
eval_iters = 20
log_interval = 20
sample_prompt = "User: What is 7 plus 5?\nAssistant:"
