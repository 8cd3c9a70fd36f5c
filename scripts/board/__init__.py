"""The leaderboard's parts: its rows, the peers, the measurement of one row, the processes, the table and the plot."""
