// SPDX-License-Identifier: Apache-2.0

package report

import "testing"

func TestBuckets(t *testing.T) {
	for _, ns := range []int64{0, 1, 7, 8, 9, 1000, 1023, 1024, 123456789, 1 << 50} {
		b := Bucket(ns)
		if up := upperBound(b); up < ns || float64(up) > float64(max(ns, 1))*1.13+1 {
			t.Errorf("%d ns is counted as up to %d ns", ns, up)
		}
	}
}

func TestQuantiles(t *testing.T) {
	if q := (Histogram{}).Quantile(500); q != 0 {
		t.Errorf("the median of nothing is %d", q)
	}
	h := Histogram{Bucket(1000): 998, Bucket(1_000_000): 1}
	h.Add(Histogram{Bucket(9_000_000): 1})
	for permille, want := range map[uint64]int64{500: 1000, 998: 1000, 999: 1_000_000, 1000: 9_000_000} {
		if q := h.Quantile(permille); q < want || float64(q) > float64(want)*1.13 {
			t.Errorf("%d per mille: %d ns, want about %d", permille, q, want)
		}
	}
}
