// SPDX-License-Identifier: Apache-2.0

package disk

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/migrated-vm/migrated/e2e/guest/stamp"
)

// step writes a block or checks it.
func (l *lane) step() {
	l.random ^= l.random << 13
	l.random ^= l.random >> 7
	l.random ^= l.random << 17
	block := l.from + uint32(l.random>>32*uint64(l.to-l.from)>>32)
	generation := l.generation(block)
	if generation == 0 || l.random&1 == 0 {
		l.write(block, generation+1)
		return
	}
	if !l.read(block, 1) {
		return
	}
	l.disk.reads.Add(1)
	if !l.compare(&l.pages[0], block, generation) {
		l.write(block, generation) // so that it is counted once
	}
}

// generation returns the generation that a block must have. A damaged entry is reported, and its block is then treated
// as one that was never written, because its content is no longer known.
func (l *lane) generation(block uint32) uint32 {
	generation, ok := l.disk.table.Get(block)
	if !ok {
		l.disk.damaged(stamp.Damage{Page: block, Word: -1, Got: l.disk.table[block], Kind: stamp.BadTable})
		l.forget(block)
		return 0
	}
	return generation
}

// forget marks a block as never written.
func (l *lane) forget(block uint32) {
	l.disk.table.Set(block, 0)
	l.sum = l.disk.table.Sum(l.from, l.to)
}

// write writes a block, and now and then flushes the disk.
func (l *lane) write(block, generation uint32) {
	d := l.disk
	l.pages[0].Write(stamp.Random, d.index(block), generation)
	if err := l.transfer(unix.Pwrite, block, 1); err != nil {
		d.failed(fmt.Errorf("write block %d: %w", block, err))
		l.forget(block) // it may hold the old content or the new
		return
	}
	d.writes.Add(1)
	l.sum += uint64(generation) - d.table.Sum(block, block+1)
	d.table.Set(block, generation)
	if l.unsaved++; l.unsaved < flushEvery {
		return
	}
	l.unsaved = 0
	if _, err := d.timed(func() (int, error) { return 0, unix.Fdatasync(int(d.file.Fd())) }); err != nil {
		d.failed(fmt.Errorf("flush: %w", err))
		return
	}
	d.flushes.Add(1)
}

// read reads blocks into the first of the lane's pages.
func (l *lane) read(block, n uint32) bool {
	err := l.transfer(unix.Pread, block, n)
	if err != nil {
		l.disk.failed(fmt.Errorf("read block %d: %w", block, err))
	}
	return err == nil
}

func (l *lane) transfer(call func(int, []byte, int64) (int, error), block, n uint32) error {
	done, err := l.disk.timed(func() (int, error) {
		return call(int(l.disk.file.Fd()), l.buffer[:n*blockSize], int64(block)*blockSize)
	})
	if err == nil && done < int(n*blockSize) {
		err = errShort
	}
	return err
}

// compare reports whether a block that was read holds what it must.
func (l *lane) compare(p *stamp.Page, block, generation uint32) bool {
	index := l.disk.index(block)
	first := p.Check(stamp.Random, index, generation)
	if first < 0 {
		return true
	}
	damage := p.Explain(stamp.Random, index, generation, first)
	damage.Page = block
	l.disk.damaged(damage)
	return false
}

// check reads all blocks of the lane that were ever written, and adds up their generations, while no step runs. It
// returns how many blocks there are and how many of them are damaged or cannot be read.
func (l *lane) check() (blocks, found uint64) {
	d := l.disk
	if sum := d.table.Sum(l.from, l.to); sum != l.sum {
		d.damaged(stamp.Damage{Page: l.from, Word: -1, Expected: l.sum, Got: sum, Kind: stamp.BadTable})
		l.sum = sum
		found++
	}
	for at := l.from; at < l.to; at += chunk {
		var generations [chunk]uint32
		n, written := min(chunk, l.to-at), uint64(0)
		for i := range n {
			if generations[i] = l.generation(at + i); generations[i] > 0 {
				written++
			}
		}
		if written == 0 {
			continue
		}
		blocks += written
		if !l.read(at, n) {
			found += written
			continue
		}
		d.reads.Add(1)
		var damaged []uint32
		for i := range n {
			if generations[i] > 0 && !l.compare(&l.pages[i], at+i, generations[i]) {
				damaged = append(damaged, i)
			}
		}
		found += uint64(len(damaged))
		for _, i := range damaged {
			l.write(at+i, generations[i]) // so that it is counted once
		}
	}
	return blocks, found
}
