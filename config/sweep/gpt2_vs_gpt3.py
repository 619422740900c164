# GPT-2's blocks beside what came after GPT-3 (RMSNorm, SwiGLU, rotary positions), at equal tokens. Learned positions are 6 % of
# the parameters at this size, which the study's fairness check says.
#
#     python research/sweep.py config/sweep/gpt2_vs_gpt3.py
name = "gpt2_vs_gpt3"
base = "config/quickstart.py --max_iters=400 --eval_interval=50 --final_eval_tokens=0 --sample_prompt= --mlp=gelu --norm=layernorm --pos=learned --qk_norm=False --init=gpt2 --optimizer=adamw --learning_rate=2e-3 --embedding_lr=0 --head_lr=0 --vector_lr=0"
arms = {
    "gpt2 (layernorm, gelu, learned)": {},
    "later (rmsnorm, swiglu, rope)": {"norm": "rmsnorm", "mlp": "swiglu", "pos": "rope"},
}
