# Teaches a pretrained model to chat: SmolLM2's base, or a run of yours by --init_from=out/mine.
# 30 layers, 9 heads, width 576, vocabulary 49,152: 134,515,008 parameters.
# Time and loss: not measured. Two epochs of the chat mix; for a smaller machine --lora_rank=16 --learning_rate=3e-4 trains 3 %
# of the weights. The conversations have to be in the model's own vocabulary. For a run of yours that is the one of its dataset:
#     python prepare_text.py --source=chat --dataset=mine_chat --tokenizer=data/mine
#     python train.py config/finetune_chat.py --init_from=out/mine --dataset=mine_chat --block_size=256 --out_dir=out/mine_chat
#
#     python prepare_text.py --source=chat --dataset=chat_smollm2 --tokenizer=HuggingFaceTB/SmolLM2-135M
#     python train.py config/finetune_chat.py
#     python sample.py --out_dir=out/finetune_chat --chat
out_dir = "out/finetune_chat"
dataset = "chat_smollm2"
init_from = "HuggingFaceTB/SmolLM2-135M"

# The size of SmolLM2; a run takes the size of what it starts from.
n_layer = 30
n_head = 9
n_kv_head = 3
n_embd = 576
mlp_hidden = 1536
norm = "rmsnorm"
mlp = "swiglu"
pos = "rope"
rope_base = 100000.0
bias = False

block_size = 1024
batch_size = 8
gradient_accumulation_steps = 4
max_epochs = 2.0
learning_rate = 1e-4
min_lr = 0.0
schedule = "linear"
warmup_iters = 20
weight_decay = 0.0

eval_interval = 100
eval_iters = 20
log_interval = 10
