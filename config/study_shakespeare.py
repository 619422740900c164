# The small model that the studies of config/sweep change, on Tiny Shakespeare by characters.
# 2 layers, 4 heads, width 128, vocabulary 65: 410,496 parameters.
# Time: not measured alone. Validation loss: 1.6959 ± 0.0023 after 400 steps (BENCHMARKS.md, "What each part is worth").
#
#     python prepare_text.py --source=shakespeare --dataset=shakespeare_char --tokenizer=char
#     python train.py config/study_shakespeare.py
out_dir = "out/study_shakespeare"
dataset = "shakespeare_char"

n_layer = 2
n_head = 4
n_embd = 128
block_size = 64
norm = "rmsnorm"
mlp = "relu2"
pos = "rope"
qk_norm = True
tie_weights = False
init = "zero_proj"

batch_size = 32
gradient_accumulation_steps = 1
max_iters = 400
optimizer = "muon"
learning_rate = 0.02
embedding_lr = 0.01
head_lr = 0.01
vector_lr = 0.01
momentum = 0.9
weight_decay = 0.0
schedule = "linear"
warmup_iters = 0
min_lr = 0.0
grad_clip = 0.0

eval_interval = 0
eval_iters = 20  # the final evaluation on the whole split follows
final_eval_tokens = 0
log_interval = 10
compile = False
sample_prompt = ""
