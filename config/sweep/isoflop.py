# The best size for a number of FLOPs: five widths at four budgets, on Tiny Shakespeare by characters. Then
# scaling.py --results=out/isoflop fits the best size of each budget, and predicts runs with twice the largest budget.
#     python prepare_text.py --source=shakespeare --dataset=shakespeare_char --tokenizer=char
#     python research/sweep.py config/sweep/isoflop.py --max_parallel=2
name = "isoflop"
base = "config/study_shakespeare.py --n_layer=3 --n_head=2 --batch_size=16 --max_iters=0"
axes = {"max_flops": [6e10, 1.2e11, 2.4e11, 4.8e11], "n_embd": [16, 24, 32, 48, 64]}
seeds = [1, 2]
