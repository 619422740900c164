# A small model of children's stories, on two CPU cores, from an empty folder to a printed story.
# 2 layers, 4 heads, width 128, vocabulary 849: 611,200 parameters.
# Time: 152 s on two cores of an AMD EPYC without bfloat16, from an empty folder to the story.
# Validation loss: 0.2562, and 0.2568 with another seed.
# prepare_tinystories.py --synthetic=True makes the stories; train.py runs it if they are missing.
#
#     python train.py config/quickstart.py
out_dir = "out/quickstart"
dataset = "tinystories_synthetic"
sample_prompt = "Once upon a time"
sample_temperature = 0.5

n_layer = 2
n_head = 4
n_embd = 128
block_size = 256
norm = "rmsnorm"
mlp = "relu2"
pos = "rope"
qk_norm = True
init = "zero_proj"
tie_weights = False

batch_size = 8
gradient_accumulation_steps = 1
max_iters = 1000
optimizer = "muon"
learning_rate = 0.02
embedding_lr = 0.03
head_lr = 0.02
vector_lr = 0.01
momentum = 0.85
min_lr = 0.0
schedule = "wsd"
decay_fraction = 0.7
warmup_iters = 20

eval_interval = 100
eval_iters = 8
log_interval = 25
compile = False  # compiling takes longer than it saves here
