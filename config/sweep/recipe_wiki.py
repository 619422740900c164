# What each part of the modern recipe is worth on real text: each arm changes one part. Two to four minutes a run on
# one core.
#     python prepare_text.py --inputs=wiki.txt --dataset=wiki --tokenizer=bpe --vocab_size=8192
#     python research/sweep.py config/sweep/recipe_wiki.py
name = "recipe_wiki"
base = (
    "config/modern_cpu.py --dataset=wiki --n_layer=5 --n_head=4 --n_embd=128 --block_size=128 --max_iters=500 "
    "--eval_interval=0 --always_save_checkpoint=False --final_eval_tokens=98304 --sample_prompt="
)
seeds = [1, 2, 3]
arms = {
    "the recipe": {},
    "embedding rate 0.1": {"embedding_lr": 0.1},
    "embedding rate 1.5": {"embedding_lr": 1.5},
    "head rate 0.03": {"head_lr": 0.03},
    "vector rate 0.03": {"vector_lr": 0.03},
    "Muon's rate 0.01": {"learning_rate": 0.01},
    "Muon's rate 0.015": {"learning_rate": 0.015},
    "momentum 0.95 throughout": {"momentum_warmup": 0},
    "momentum 0.9 throughout": {"momentum": 0.9, "momentum_warmup": 0},
    "Adam's beta1 0.9": {"beta1": 0.9},
    "SwiGLU": {"mlp": "swiglu"},
    "softcap 15": {"logit_softcap": 15.0},
    "heads of 64": {"n_head": 2},
    "RoPE base 1000": {"rope_base": 1000.0},
    "decay over the last 0.7": {"decay_fraction": 0.7},
    "no warmup": {"warmup_iters": 0},
}
