// SPDX-License-Identifier: Apache-2.0

package ram

// DropPiece is the number of bytes that one system call drops.
const DropPiece = dropPiece
