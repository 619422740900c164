# A model that was taught to chat: greetings, names, small sums, questions about a sentence; on a laptop without a GPU.
# 4 layers, 4 heads, width 192, vocabulary 768: 2,066,112 parameters.
# Time: five minutes by the clock, on two cores of an AMD EPYC at half its usual speed. Validation loss on the assistant's words:
# 0.123. 100 of 100 one-digit sums right, each pair of numbers in a wording that was held out of training for that pair.
# The conversations of --source=small_talk are generated, without a network. For those that --source=chat downloads, give
# prepare_text.py --vocab_size=4096 and --dataset=chat_mix, and train.py --dataset=chat_mix and --max_minutes=60.
#
#     python prepare_text.py --source=small_talk --dataset=chat --tokenizer=bpe --vocab_size=768
#     python train.py config/train_chat.py
#     python sample.py --out_dir=out/chat --chat
#     python evaluate.py --checkpoints=out/chat --tasks=sums
out_dir = "out/chat"
dataset = "chat"

n_layer = 4
n_head = 4
n_embd = 192
block_size = 512
norm = "rmsnorm"
mlp = "relu2"
pos = "rope"
qk_norm = True
init = "zero_proj"
tie_weights = False

batch_size = 8
gradient_accumulation_steps = 1
max_minutes = 5.0
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
sample_prompt = "<|im_start|>user\nWhat is 7 plus 5?<|im_end|>\n<|im_start|>assistant\n"
