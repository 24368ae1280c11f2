package sim
import "testing"
func TestZZ(t *testing.T){ s := Random(1795426086308791428); s.Kills=[]float64{0.002,0.01,0.05}[13%3]; r := Run(s, Hooks{}); t.Log(r.Violation) }
