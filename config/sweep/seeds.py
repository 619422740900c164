# How much does luck matter? One model, eight seeds: any other difference should be larger than this.
#
#     python research/sweep.py config/sweep/seeds.py
name = "seeds"
base = "config/quickstart.py --max_iters=400 --eval_interval=50 --final_eval_tokens=0 --sample_prompt="
seeds = [1, 2, 3, 4, 5, 6, 7, 8]
