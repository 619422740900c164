# The blocks of GPT-2 against later ones (RMSNorm, SwiGLU, rotary positions), at equal tokens. The parameters
# differ: at this size, learned positions are 5 % of them.
#     python research/sweep.py config/sweep/gpt2_vs_gpt3.py
name = "gpt2_vs_gpt3"
base = "config/quickstart.py --max_iters=400 --eval_interval=50 --final_eval_tokens=0 --sample_prompt= --mlp=gelu --norm=layernorm --pos=learned --qk_norm=False --init=gpt2 --optimizer=adamw --learning_rate=2e-3 --embedding_lr=0 --head_lr=0 --vector_lr=0"
arms = {
    "gpt2 (layernorm, gelu, learned)": {},
    "later (rmsnorm, swiglu, rope)": {"norm": "rmsnorm", "mlp": "swiglu", "pos": "rope"},
}
