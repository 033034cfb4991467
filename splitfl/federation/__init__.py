"""How clients are dealt their records, whom a round asks, and how their layers are merged."""
