# The learning rate of Muon at four widths: does the best one move with the width? plot.py draws the grid as a heat map.
#     python prepare_text.py --source=shakespeare --dataset=shakespeare_char --tokenizer=char
#     python research/sweep.py config/sweep/lr_width.py
name = "lr_width"
base = "config/study_shakespeare.py --max_iters=150"
axes = {"n_embd": [32, 64, 128, 256], "learning_rate": [0.005, 0.01, 0.02, 0.04, 0.08]}
nuisance = ["learning_rate"]
seeds = [1, 2]
