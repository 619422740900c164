# What each part of the modern recipe is worth, on Shakespeare by characters: each arm changes one part.
#     python prepare_text.py --source=shakespeare --dataset=shakespeare_char --tokenizer=char
#     python research/sweep.py config/sweep/recipe.py
name = "recipe"
base = "config/study_shakespeare.py"
_one_rate = {"embedding_lr": 0.0, "head_lr": 0.0, "vector_lr": 0.0}
arms = {
    "the recipe": {},
    "AdamW at 1e-3": {"optimizer": "adamw", "learning_rate": 1e-3, "warmup_iters": 20, "grad_clip": 1.0, **_one_rate},
    "AdamW at 3e-3": {"optimizer": "adamw", "learning_rate": 3e-3, "warmup_iters": 20, "grad_clip": 1.0, **_one_rate},
    "AdamW at 1e-2": {"optimizer": "adamw", "learning_rate": 1e-2, "warmup_iters": 20, "grad_clip": 1.0, **_one_rate},
    "one learning rate": _one_rate,
    "learned positions": {"pos": "learned"},
    "LayerNorm": {"norm": "layernorm"},
    "GELU": {"mlp": "gelu"},
    "SwiGLU": {"mlp": "swiglu"},
    "no QK-norm": {"qk_norm": False},
    "twice the learning rate": {"learning_rate": 0.04},
    "twice the learning rate, no QK-norm": {"learning_rate": 0.04, "qk_norm": False},
    "GPT-2's initialisation": {"init": "gpt2"},
    "tied head": {"tie_weights": True},
    "softcap 15": {"logit_softcap": 15.0},
    "cosine": {"schedule": "cosine"},
    "wsd, decay over the last 0.4": {"schedule": "wsd", "decay_fraction": 0.4},
    "weight decay 0.1": {"weight_decay": 0.1},
    "momentum 0.95": {"momentum": 0.95},
    "gradient clipping at 1": {"grad_clip": 1.0},
}
